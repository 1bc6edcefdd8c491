"""Linear attention, a fast-weight programmer: a matrix of associations that each token adds to.

Source: Katharopoulos et al., "Transformers are RNNs" (2006.16236), eq. 4–12; Schlag, Irie and Schmidhuber, "Linear
Transformers Are Secretly Fast Weight Programmers" (2102.11174), §3 and eq. 37 (DPFP).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from zoo.errors import ZooError
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import merge_heads, norm, split_heads
from zoo.types import Array

EPSILON = 1e-6
"""Added to the denominator."""


def feature_map(kind: str, x: Float[Array, "*lead K"]) -> Float[Array, "*lead F"]:
    """phi(x): elu (elu + 1), relu, identity, softmax over features, or dpfp1 to dpfp3 (deterministic parameter-free
    projection: r = [relu(x), relu(−x)], r ⊙ roll(r, i) for i = 1..n, so 2·n·K features).

    Raises ZooError for another name.
    """
    match kind:
        case "elu":
            return jax.nn.elu(x) + 1
        case "relu":
            return jax.nn.relu(x)
        case "identity":
            return x
        case "softmax":
            return jax.nn.softmax(x, axis=-1)
        case "dpfp1" | "dpfp2" | "dpfp3":
            both = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
            return jnp.concatenate([both * jnp.roll(both, i, -1) for i in range(1, int(kind[-1]) + 1)], axis=-1)
    raise ZooError(f"linear: features is elu, relu, identity, softmax or dpfp1 to dpfp3, got {kind!r}")


class LinearAttention(Mixer):
    """S_t = S_{t−1} + phi(k_t) v_tᵀ; out_t = S_tᵀ phi(q_t), normalised.

    heads      H; as many of 64 features as fit unless given
    features   phi, see `feature_map`
    normalise  "sum" divides by phi(q_t) · sum of phi(k) (the papers; needs features that are not negative), "rms"
               normalises each head's output instead (steadier), "none" does neither
    causal     False lets every token see all
    """

    heads: int | None = None
    features: str = "elu"
    normalise: str = "sum"

    ways = (True, False)

    def setup(self) -> None:
        if self.normalise not in ("sum", "rms", "none"):
            raise ZooError(f"linear: normalise is sum, rms or none, got {self.normalise!r}")
        if self.normalise == "sum" and self.features == "identity":
            raise ZooError("linear: normalise='sum' needs features that are not negative, got 'identity'")
        heads = head_count("linear", self.dim, self.heads)
        width = self.dim // heads
        self.query, self.key, self.value = (split_heads(self.dim, heads, width, dtype=self.dtype) for _ in range(3))
        self.out = merge_heads(heads, width, self.dim, dtype=self.dtype)
        if self.normalise == "rms":
            self.norm = norm("rms", axis="head_width", dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        q, k, v = self._projected(x)
        if mask is not None:
            k = jnp.where(mask[..., None, None], k, 0)
        out, _ = linear_attention(q, k, v, scale=1.0, causal=self.causal, segment_ids=segment_ids)
        return self._read_out(out)

    def initial_state(self, batch: int, capacity: int = 2048) -> Float[Array, "B H F V"]:
        self.check_causal()
        heads = head_count("linear", self.dim, self.heads)
        width = self.dim // heads
        features = jax.eval_shape(lambda x: feature_map(self.features, x), jnp.zeros(width)).size
        return jnp.zeros((batch, heads, features, width + (self.normalise == "sum")), jnp.float32)

    def step(
        self, x: Float[Array, "B D"], state: Float[Array, "B H F V"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B H F V"]]:
        out, state = linear_attention_step(*self._projected(x), state, scale=1.0)
        return self._read_out(out), state

    def _projected(self, x: Float[Array, "*lead D"]) -> tuple[Array, Array, Array]:
        q, k = (feature_map(self.features, project(x)) for project in (self.query, self.key))
        v = self.value(x)
        if self.normalise == "sum":
            # The sum of keys is one more value, which is always 1.
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        return q, k, v

    def _read_out(self, out: Float[Array, "*lead H V"]) -> Float[Array, "*lead D"]:
        if self.normalise == "sum":
            out = out[..., :-1] / (out[..., -1:] + EPSILON)
        elif self.normalise == "rms":
            out = self.norm(out)
        return self.out(out)
