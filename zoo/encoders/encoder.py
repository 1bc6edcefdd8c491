"""What every encoder is: a recording's window in, features out.

    encoder = zoo.create("eegnet_base", channels=("FP1", "FP2", "C3", "C4"), samples=256)
    encoded = encoder.apply(variables, signal, sensors)            # zoo.types.Encoded
    logits = encoder.head(classes=3).apply(head, encoded.pooled)   # the published classifier

Some encoders take any channels in any order and know them by name or place (`ORDER_FREE`). The others are made for one
montage: their option `channels` is the names they want, in their order, or only their number where channels have no
canonical name; another recording is refused, or led to them by a channel adapter (`zoo.layers.channel_adapter`).

An encoder has the variables of any Flax module: `params`, and in collections what is not learned by gradient. In
training (`train=True`) these collections must be mutable, and the stream "dropout" be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.sensors import KINDS, NAMES
from zoo.types import AnyArray, Array, Encoded, Sensors

SHOWN = 12
"""How many channels an error lists before it says how many more there are."""


class Encoder(nn.Module):
    """The contract, and the checks that all share. An encoder's own fields are its configuration.

    TAKES       kinds of channel it takes
    ORDER_FREE  channels may come in any order: tokens of channels move with them, everything else stays as it is
    """

    TAKES: ClassVar[tuple[str, ...]] = KINDS
    ORDER_FREE: ClassVar[bool] = True

    @property
    def sampling_rate(self) -> float | None:
        """Hz that its windows are measured in; None where any will do."""
        return None

    @property
    def montage(self) -> int | tuple[str, ...] | None:
        """Canonical names of the channels it wants, in its order, or how many; None where it takes any."""
        return None

    @property
    def subjects(self) -> int:
        """Rows of its subject layer: it is called with `subject`; 0 where it has none."""
        return 0

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        raise NotImplementedError

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """Tokens [B, N, D], which of them are there, and one vector a window [B, D], all float32.

        What lies in channels that are not valid is never read. mask hides tokens, as [B, C, A] where they are patches
        of channels, else [B, N]; an encoder that cannot hide any raises ZooError when it is given.
        """
        raise NotImplementedError

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """The published classifier: pooled [B, D] → logits [B, classes]; called with `train`. A linear map unless
        the encoder has another."""
        return LinearHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        raise NotImplementedError

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The smallest input."""
        raise NotImplementedError

    @nn.nowrap
    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when a recording of this rate and of channels of these kinds and canonical names is not its.

        Names are upper case, "" for a channel that has none.
        """
        wanted = self.sampling_rate
        if wanted is not None and abs(rate_hz - wanted) > 1e-6 * wanted:
            raise ZooError(f"{type(self).__name__}: got a signal at {rate_hz:g} Hz, wanted {wanted:g} Hz")
        for kind in dict.fromkeys(kinds):
            if kind not in self.TAKES:
                raise ZooError(f"{type(self).__name__}: got channels of kind {kind!r}, takes {', '.join(self.TAKES)}")
        self.check_sensors(names)

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError, naming them, when channels of these canonical names are not those it wants."""
        check_montage(type(self).__name__, self.montage, names)

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, with valid channels whose place it must know and does not."""

    @nn.nowrap
    def present(self, signal: AnyArray, sensors: Sensors) -> Float[Array, "B C T"]:
        """The signal in float32, zero in channels that are not valid.

        Raises ZooError for sensors of other channels than the signal's, and for channels that are not the montage's:
        their number always, their names where the sensors are numpy's, as the loader gives them; inside `jax.jit` names
        are not known, so the host asks `check_recording` first.
        """
        name, shape = type(self).__name__, signal.shape[:2]
        if sensors.valid.shape != shape:
            raise ZooError(f"{name}: got sensors of {list(sensors.valid.shape)} for a signal of {list(signal.shape)}")
        if isinstance(self.montage, int):
            check_montage(name, self.montage, ("",) * shape[1])
        elif self.montage is not None:
            if isinstance(sensors.name, np.ndarray):
                for row in np.unique(sensors.name, axis=0):
                    check_montage(name, self.montage, [NAMES[each] if each >= 0 else "" for each in row])
            check_montage(name, len(self.montage), ("",) * shape[1])
        return jnp.where(jnp.asarray(sensors.valid)[:, :, None], jnp.asarray(signal, jnp.float32), 0)


class LinearHead(nn.Module):
    """[B, D] → [B, classes]; it begins as PyTorch's Linear does, times `shrink`."""

    classes: int
    shrink: float = 1.0

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        def shrunk(init: Any) -> Any:
            return lambda *given: self.shrink * init(*given)

        bias = shrunk(like_torch_bias(pooled.shape[-1]))
        linear = dense(self.classes, (None, None), bias=True, init=shrunk(LIKE_TORCH), bias_init=bias, name="linear")
        return linear(jnp.asarray(pooled))


def check_montage(who: str, wanted: int | Sequence[str] | None, names: Sequence[str]) -> None:
    """Raises ZooError where channels of these names are not the wanted ones in the wanted order, saying which."""
    if wanted is None:
        return
    if isinstance(wanted, int):
        if len(names) != wanted:
            raise ZooError(f"{who}: got {len(names)} channels, wanted {wanted}")
        return
    if tuple(names) == tuple(wanted):
        return
    missing = [name for name in wanted if name not in names]
    extra = [name or "(no canonical name)" for name in names if name not in wanted]
    if missing:
        wrong = f"lacks {_shown(missing)}"
    elif extra:
        wrong = f"has also {_shown(extra)}"
    else:
        wrong = f"has them in another order: {_shown(names)}"
    raise ZooError(f"{who}: wanted channels {_shown(wanted)} in this order; the recording {wrong}")


def _shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def blank(channels: Sequence[str] | int, samples: int, kind: str = "eeg") -> tuple[Any, Sensors]:
    """A window of zeros [1, C, T] of valid channels without places: what `Encoder.example` of most encoders is."""
    names = ("",) * channels if isinstance(channels, int) else tuple(channels)
    unknown = jnp.zeros((1, len(names), 3))
    index = jnp.array([[NAMES.index(name) if name in NAMES else -1 for name in names]], jnp.int32)
    kinds = jnp.full((1, len(names)), KINDS.index(kind), jnp.int32)
    sensors = Sensors(unknown, unknown, kinds, index, jnp.ones((1, len(names)), bool))
    return jnp.zeros((1, len(names), samples)), sensors
