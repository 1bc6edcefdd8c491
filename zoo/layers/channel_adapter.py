"""From the channels that a recording has to those that an encoder wants.

adapter = ChannelAdapter("interpolate", outputs=encoder.montage)
encoder = Adapted(encoder, adapter)                       # an encoder of any scalp EEG with known positions
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.devices import on_devices
from zoo.sensors import KINDS, NAME_INDEX
from zoo.types import AnyArray, Array, Sensors

ADAPTERS = ("identity", "learned", "interpolate")
EEG = KINDS.index("eeg")
TERMS, STIFFNESS = 50, 4
"""Of the Legendre series and m of Perrin et al.'s g, as MNE has them."""
FEWEST = 16
"""Fewer electrodes do not fix a sphere: theirs is the template's."""
IDEAL = 1e-3
"""Radii that vary by less than this share were computed on a sphere, not measured on a head."""


class ChannelAdapter(nn.Module):
    """Signal [B, C, T] and its sensors → signal [B, E, T] and the sensors of the `outputs`.

    kind         identity: as it is. learned: each output is a learned sum of the inputs, which must always be the same.
                 interpolate: the potential at each output's place, from the electrodes that are there
    outputs      names of the E channels in their order, or how many they are (learned only); identity needs none
    inputs       names of the C channels or how many, of a learned map; None: it takes any order it is once given
    max_norm     largest norm of the weights of one learned output; 0: none. EEGPT's probe has 1
    regulariser  added to the spline's diagonal

    Interpolation is by spherical splines (Perrin et al. 1989, Electroencephalography and Clinical Neurophysiology 72:
    184–187), for each example from its valid EEG electrodes with a known position, so that bad channels never count.
    It is MNE's matrix (`Raw.interpolate_bads`, regulariser 1e-5), in float32: signals agree to about 1e-3. Directions
    are seen from the centre of the sphere fitted to the electrodes. Outputs lie where MNE's colin27_1005 template has
    them; where the recording's electrodes lie exactly on a sphere, and so were computed, where easycap-M1 has them.
    """

    kind: str
    outputs: int | tuple[str, ...] = ()
    inputs: int | tuple[str, ...] | None = None
    max_norm: float = 0.0
    regulariser: float = 1e-5

    @nn.compact
    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> tuple[Float[AnyArray, "B E T"], Sensors]:
        """Raises ZooError for another kind, outputs it cannot lead to, and inputs that are not those named."""
        self._check()
        if self.kind == "identity":
            return signal, sensors
        signal = jnp.where(jnp.asarray(sensors.valid)[:, :, None], jnp.asarray(signal, jnp.float32), 0)
        if self.kind == "learned":
            wanted = len(self.inputs) if isinstance(self.inputs, tuple) else self.inputs
            if wanted not in (None, signal.shape[1]):
                raise ZooError(f"channel adapter 'learned': got {signal.shape[1]} channels, wanted {wanted}")
            mix = Convolution(self.count, (1,), max_norm=self.max_norm, name="mix")
            return mix(signal.swapaxes(1, 2)).swapaxes(1, 2), self.sensors(sensors)
        assert isinstance(self.outputs, tuple)
        options = self.outputs, self.regulariser
        arrays = jnp.asarray(sensors.position, jnp.float32), usable(sensors)
        matrix = on_devices(
            lambda position, there: spline_matrix(position, there, *options),
            arrays,
            (("batch", None, None), ("batch", None)),
            ("batch", None, None),
        )
        return jnp.einsum("bec,bct->bet", matrix, signal), self.sensors(sensors)

    @property
    def count(self) -> int:
        """E."""
        return self.outputs if isinstance(self.outputs, int) else len(self.outputs)

    @nn.nowrap
    def sensors(self, given: Sensors) -> Sensors:
        """Those of the outputs, on the scalp where they have names; valid where any input of the example is."""
        batch, names = given.valid.shape[0], self.outputs if isinstance(self.outputs, tuple) else ("",) * self.count
        shape = (batch, self.count)
        position = np.full((self.count, 3), np.nan, np.float32)
        if self.kind == "interpolate":
            position = template_positions(names)
        kind = np.full(shape, EEG, np.int32) if self.kind == "interpolate" else jnp.asarray(given.kind)[:, :1]
        return Sensors(
            position=np.broadcast_to(position, (*shape, 3)),
            orientation=np.full((*shape, 3), np.nan, np.float32),
            kind=jnp.broadcast_to(kind, shape),
            name=np.broadcast_to(np.array([NAME_INDEX.get(name, -1) for name in names], np.int32), shape),
            valid=jnp.broadcast_to(jnp.asarray(given.valid).any(1, keepdims=True), shape),
        )

    @nn.nowrap
    def _check(self) -> None:
        if self.kind not in ADAPTERS:
            raise ZooError(f"channel adapter: got {self.kind!r}, wanted one of {', '.join(ADAPTERS)}")
        if self.kind == "interpolate" and not (isinstance(self.outputs, tuple) and self.outputs):
            raise ZooError(f"channel adapter 'interpolate': got outputs {self.outputs!r}, wanted names of electrodes")
        if self.kind == "learned" and not self.count:
            raise ZooError("channel adapter 'learned': wanted outputs, names of channels or how many")


def usable(sensors: Sensors) -> Bool[Array, "B C"]:
    """Valid EEG electrodes whose position is known."""
    placed = jnp.isfinite(jnp.asarray(sensors.position)).all(-1)
    return jnp.asarray(sensors.valid) & (jnp.asarray(sensors.kind) == EEG) & placed


def spline_matrix(
    position: Float[Array, "B C 3"], there: Bool[Array, "B C"], names: tuple[str, ...], regulariser: float = 1e-5
) -> Float[Array, "B E C"]:
    """What takes the potentials of the electrodes that are `there` to those at the named places; else zeros.

    [g(e, c), 1] · [[g(c, c') + regulariser, 1], [1, 0]]^-1, less its last column: every output's weights sum to one.
    """
    sphere, measured = _template(names)
    place = jnp.where(there[..., None], position, 0) / 0.1
    own_centre = _centre(place, there)
    radius = jnp.linalg.norm(place - own_centre[:, None], axis=-1)
    mean = radius.mean(-1, keepdims=True, where=there)
    ideal = jnp.sqrt(jnp.square(radius - mean).mean(-1, where=there)) < IDEAL * mean[:, 0]
    enough = there.sum(1) >= FEWEST
    centre = jnp.where(enough[:, None], own_centre, template_centre(names) / 0.1)
    source = place - centre[:, None]
    source /= jnp.maximum(jnp.linalg.norm(source, axis=-1, keepdims=True), 1e-6)
    goal = jnp.where((enough & ideal)[:, None, None], sphere, measured)

    both = there[:, :, None] & there[:, None]
    among = jnp.where(both, _g(jnp.einsum("bix,bjx->bij", source, source)), 0)
    # An electrode that is not there solves an equation of its own.
    among += jnp.where(there, regulariser, 1)[:, :, None] * jnp.eye(there.shape[1])
    ones = there[..., None].astype(jnp.float32)
    corner = jnp.where(there.any(1), 0.0, 1.0)[:, None, None]
    system = jnp.block([[among, ones], [ones.swapaxes(1, 2), corner]])
    onto = jnp.where(there[:, None], _g(jnp.einsum("bex,bcx->bec", goal, source)), 0)
    right = jnp.concatenate([onto, jnp.ones((*onto.shape[:2], 1))], axis=-1)
    weights = jnp.linalg.solve(system, right.swapaxes(1, 2)).swapaxes(1, 2)[..., :-1]
    return jnp.where(there[:, None], weights, 0)


def _g(cosine: Array) -> Array:
    """Perrin et al.'s g, Σ (2n + 1) / (n(n + 1))^m · P_n(cosine) / 4π, by the recurrence of Legendre's polynomials."""
    n = np.arange(1, TERMS + 1)
    factor = (2 * n + 1) / ((n * (n + 1.0)) ** STIFFNESS * 4 * np.pi)
    cosine = jnp.clip(cosine, -1, 1)

    def add(carry: Any, given: Any) -> Any:
        total, before, now = carry
        n, factor = given
        return (total + factor * now, now, ((2 * n + 1) * cosine * now - n * before) / (n + 1)), None

    first = (jnp.zeros_like(cosine), jnp.ones_like(cosine), cosine)
    return jax.lax.scan(add, first, (jnp.float32(n), jnp.float32(factor)))[0][0]


def _centre(place: Array, there: Array) -> Array:
    """Centre [B, 3] of the least-squares sphere through what is there: |p|² = 2 p·c + (r² − |c|²)."""
    rows = jnp.concatenate([2 * place, jnp.ones((*there.shape, 1))], axis=-1) * there[..., None]
    squares = jnp.square(place).sum(-1) * there
    normal = jnp.einsum("bci,bcj->bij", rows, rows) + 1e-6 * jnp.eye(4)
    return jnp.linalg.solve(normal, jnp.einsum("bci,bc->bi", rows, squares)[..., None])[:, :3, 0]


def _template(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Directions from the centre, on the drawn sphere and on the measured head, [E, 3] float32 each."""
    from zoo.data.electrodes import template

    directions = []
    for spherical in (True, False):
        position, centre = template(names, spherical)
        offset = position - centre
        directions.append((offset / np.linalg.norm(offset, axis=1, keepdims=True)).astype(np.float32))
    return directions[0], directions[1]


def template_centre(names: tuple[str, ...]) -> np.ndarray:
    """Centre [3] float32 of that template."""
    from zoo.data.electrodes import template

    return template(names)[1].astype(np.float32)


def template_positions(names: tuple[str, ...]) -> np.ndarray:
    """Where the template of a measured head has these electrodes, [E, 3] float32, metres in head coordinates."""
    from zoo.data.electrodes import template

    return template(names)[0].astype(np.float32)
