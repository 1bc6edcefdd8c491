"""fMRI by regions: each region's signal cut into patches of volumes, all patches of all regions one sequence.

    encoder = zoo.create("regions_base", place="index", rows=94)
    encoded = encoder.apply(variables, signal, sensors)                   # signal [B, regions, volumes]

Ours, in the manner of encoders of EEG by channels and patches (LaBraM, ICLR 2024, §2.2) and of parcels and their time
courses: a token is a linear map of one patch, plus what tells its region and its time. Mixers that can look both ways
do, over the tokens region by region.

Input: BOLD of regions, vertices or voxels, each z-scored over its recording, in volumes of one repetition time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.mixer import MIXERS, mixer_class
from zoo.layers.parameters import dense, partitioned
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

RADIUS = 0.1
"""Metres; brings places in the head to about one."""


class RegionEncoder(Encoder):
    """The encoder.

    patch      volumes of a token
    place      how regions are told apart. index: by a table of `rows`, for one atlas. position: by an MLP of where
               their centres lie in the head, for any
    rows       of the table
    mixers, mixer_options, mlp, mlp_options, norm, remat   see `Backbone`
    """

    dim: int = 256
    patch: int = 10
    place: str = "index"
    rows: int = 512
    mixers: tuple[str, ...] = ("softmax",) * 8
    mixer_options: Mapping[str, Mapping[str, Any]] | None = None
    mlp: str = "gelu"
    mlp_options: Mapping[str, Any] | None = None
    norm: str = "rms"
    table_std: float = 0.5
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("roi", "vertex", "voxel")

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] (z-scored volumes) → Encoded, N = C·A tokens, all patches of a region in turn.

        mask [B, C, A] bool: True where the mask token stands in for the patch. Tokens of regions that are not valid
        are not seen. Raises ZooError where T is not a multiple of the patch, the table has too few rows, or `place` is
        another.
        """
        if self.place not in ("index", "position"):
            raise ZooError(f"RegionEncoder place: got {self.place!r}, wanted 'index' or 'position'")
        signal = self.present(signal, sensors)
        batch, regions, volumes = signal.shape
        _, count = self.grid(regions, volumes)
        x = dense(self.dim, (None, "embed"), bias=True, dtype=self.dtype, name="embed_patch")(
            signal.reshape(batch, regions, count, self.patch)
        )
        if mask is not None:
            token = self.param("embed_mask", partitioned(nn.initializers.normal(0.02), "embed"), (self.dim,))
            x = jnp.where(jnp.asarray(mask)[..., None], token.astype(x.dtype), x)
        x += self._places(sensors, regions)[:, :, None].astype(x.dtype) + self._times(count).astype(x.dtype)
        x = nn.with_logical_constraint(x.reshape(batch, -1, self.dim), ("batch", "tokens", None))
        valid = jnp.repeat(jnp.asarray(sensors.valid), count, axis=1)
        backbone = Backbone(
            self.dim,
            self.mixers,
            self._mixer_options(),
            self.mlp,
            self.mlp_options,
            self.norm,
            remat=self.remat,
            dtype=self.dtype,
            name="backbone",
        )
        tokens: Any = backbone(x, mask=valid, train=train)
        tokens = tokens.astype(jnp.float32)
        pooled = jnp.sum(tokens, axis=1, where=valid[..., None]) / jnp.maximum(valid.sum(1), 1)[:, None]
        return Encoded(tokens, pooled, valid)

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        """(regions, patches of each). Raises ZooError for a window it cannot cut."""
        if not samples or samples % self.patch:
            raise ZooError(f"RegionEncoder: got a window of {samples} volumes, wanted a multiple of {self.patch}")
        return channels, samples // self.patch

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in its matrices and, as if all tokens saw all, attention; a
        multiply-add counting two."""
        params: Any = jax.eval_shape(self.init, jax.random.key(0), *self.example())["params"]
        matrices = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params["backbone"])) if leaf.ndim > 2)
        tokens = channels * (samples // self.patch)
        attention = sum(MIXERS[name].startswith("zoo.attention") for name in self.mixers)
        return float(2 * tokens * (matrices + self.patch * self.dim + 2 * attention * tokens * self.dim))

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One patch of one region."""
        return blank(1, self.patch, self.TAKES[0])

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for more regions than the table has rows."""
        if self.place == "index" and len(names) > self.rows:
            raise ZooError(f"RegionEncoder place 'index': got {len(names)} regions, wanted at most rows {self.rows}")

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for valid regions of no known position where they are told apart by it."""
        unknown = np.asarray(sensors.valid) & ~np.isfinite(np.asarray(sensors.position)).all(-1)
        if self.place == "position" and unknown.any():
            raise ZooError(
                f"RegionEncoder place 'position': got {unknown.sum()} regions of no known position, wanted none; place "
                "'index' needs none"
            )

    def _places(self, sensors: Sensors, regions: int) -> Float[Array, "_ C D"]:
        if self.place == "index":
            self.check_sensors(("",) * regions)
            init = partitioned(nn.initializers.normal(self.table_std), None, "embed")
            return self.param("embed_region", init, (self.rows, self.dim))[None, :regions]
        where = dense(self.dim, (None, "mlp"), bias=True, name="place_in")(sensors.position / RADIUS)
        place = dense(self.dim, ("mlp", "embed"), name="place_out")(nn.gelu(where))
        return jnp.where(jnp.asarray(sensors.valid)[..., None], place, 0.0)

    def _times(self, count: int) -> Float[Array, "A D"]:
        """Sinusoids of the number of the patch (1706.03762, §3.5), as large as the table's rows."""
        angle = jnp.arange(count)[:, None] * 10_000.0 ** (-jnp.arange(0, self.dim, 2) / self.dim)
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, : self.dim]
        return 2**0.5 * self.table_std * waves

    @nn.nowrap
    def _mixer_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Those given; both ways where a mixer can; no rotary positions, since regions follow one another."""
        options = {name: dict(each) for name, each in (self.mixer_options or {}).items()}
        for name in self.mixers:
            mixer = mixer_class(name)
            own = options.setdefault(name, {})
            if False in mixer.ways:
                own.setdefault("causal", False)
            if "rotary" in mixer.__dataclass_fields__:
                own.setdefault("rotary", False)
        return options


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "regions_tiny": ({"dim": 64, "mixers": ("softmax",) * 2}, 132_736),
    "regions_base": ({}, 6_439_936),
    "regions_large": ({"dim": 768, "mixers": ("softmax",) * 12}, 85_401_600),
}
"""Options, parameters. All are ours."""

for _name, (_options, _parameters) in VARIANTS.items():
    register(
        _name,
        RegionEncoder,
        _options,
        Card(
            title=f"Encoder of fMRI by regions, {_parameters / 1e6:.1f} M parameters",
            paper="none: ours, after LaBraM (ICLR 2024)",
            code="this repository",
            licence="Apache-2.0",
            inputs="BOLD [B, C, A·10] of regions, vertices or voxels, z-scored, one repetition time a sample",
            parameters=_parameters,
            evidence="contract: tests/test_encoders.py; trained: tests/objectives/test_contrast_modalities.py",
        ),
    )
