"""The recurrences under the linear and delta mixers against fla's definitions in PyTorch: outputs and all gradients.

fla's layers themselves need a GPU: what stands around the recurrences is tested against the papers' formulas in
`tests/state_space/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
pytest.importorskip("triton", reason="fla's modules import Triton, though its definitions do not use it")
gla = pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention is the peer")

from fla.ops.delta_rule.naive import delta_rule_recurrence  # noqa: E402
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule  # noqa: E402
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate  # noqa: E402
from fla.ops.kda.naive import naive_recurrent_kda  # noqa: E402
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn  # noqa: E402
from fla.ops.retention.naive import naive_retention  # noqa: E402

from kernels.delta_rule import delta_rule  # noqa: E402
from kernels.linear_attention import linear_attention  # noqa: E402
from zoo.state_space.deltanet import unit_length  # noqa: E402
from zoo.state_space.kda import KDA  # noqa: E402
from zoo.state_space.lightnet import running_logsumexp  # noqa: E402
from zoo.state_space.linear import LinearAttention  # noqa: E402
from zoo.state_space.retention import Retention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 20, 3, 8, 6
Arrays = dict[str, np.ndarray]


def arrays(**shapes: tuple[int, ...]) -> Arrays:
    """q, k and v, and what else is named by its shape after [B, T]."""
    own: dict[str, tuple[int, ...]] = {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE), **shapes}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((BATCH, LENGTH, *shape)).astype(np.float32) for name, shape in own.items()}


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], given: Arrays) -> None:
    """Results [B, T, ...] of both and their gradients by every argument."""
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in given.items()}
    wanted = theirs(**leaves)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)
    wanted.backward(torch.tensor(cotangent))

    @jax.jit
    def pulled(given: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        out, pull = jax.vjp(lambda given: ours(**given), given)
        return out, pull(jnp.asarray(cotangent))[0]

    got, gradients = pulled({name: jnp.asarray(x) for name, x in given.items()})
    close(got, wanted.detach().numpy())
    for name, gradient in gradients.items():
        close(gradient, leaves[name].grad.numpy())


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def heads_first(op: Callable[..., Any]) -> Callable[..., Any]:
    """A definition of [B, H, T, ...], called with [B, T, H, ...]."""

    def called(*given: Any) -> Any:
        out = op(*(x.transpose(1, 2) for x in given))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return called


def unit(x: Any) -> Any:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def test_linear_attention():
    """The whole mixer, whose projections are arguments here."""
    names = ("query", "key", "value")
    dim = HEADS * KEY
    rng = np.random.default_rng(3)
    kernels = {name: rng.standard_normal((dim, HEADS, KEY)).astype(np.float32) / dim**0.5 for name in names}
    given = {"x": rng.standard_normal((BATCH, LENGTH, dim)).astype(np.float32), **kernels}
    out = np.eye(dim, dtype=np.float32).reshape(HEADS, KEY, dim)

    def ours(x: Any, **kernels: Any) -> Any:
        weights = {name: {"kernel": kernel} for name, kernel in [*kernels.items(), ("out", jnp.asarray(out))]}
        return LinearAttention(dim, heads=HEADS).apply({"params": weights}, x)

    def theirs(x: Any, **kernels: Any) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, kernels[name]) for name in names)
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        return naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=True)[0].flatten(2)

    agree(ours, theirs, given)


def test_retention():
    log_decay = Retention(HEADS * KEY, heads=HEADS).log_decay()
    agree(
        lambda q, k, v: linear_attention(q, k, v, log_decay=log_decay)[0],
        lambda q, k, v: heads_first(naive_retention)(q, k, v),
        arrays() | {"v": arrays(v=(HEADS, KEY))["v"]},
    )


def test_gated_linear_attention():
    agree(
        lambda q, k, v, g: linear_attention(q, k, v, log_decay=jax.nn.log_sigmoid(g) / 16)[0],
        lambda q, k, v, g: gla.naive_recurrent_gla(q, k, v, torch.nn.functional.logsigmoid(g) / 16)[0],
        arrays(g=(HEADS, KEY)),
    )


def test_lightnet():
    """fla's decay and key, from the running log-sum of keys, into its gated linear attention."""

    def ours(q: Any, k: Any, v: Any) -> Any:
        log_sum = running_logsumexp(k, None)
        log_decay = jnp.concatenate([log_sum[:, :1], log_sum[:, :-1]], axis=1) - log_sum
        return linear_attention(q, jnp.exp(k - log_sum), v, log_decay=log_decay)[0]

    def theirs(q: Any, k: Any, v: Any) -> Any:
        z = k.logcumsumexp(1)
        g = torch.cat((z[:, :1], z[:, :-1]), 1) - z
        return gla.naive_recurrent_gla(q, torch.exp(k - z), v, g)[0]

    agree(ours, theirs, arrays())


def test_delta_rule():
    agree(
        lambda q, k, v, beta: delta_rule(unit_length(q), unit_length(k), v, 2 * jax.nn.sigmoid(beta))[0],
        lambda q, k, v, beta: heads_first(delta_rule_recurrence)(unit(q), unit(k), v, 2 * beta.sigmoid()),
        arrays(beta=(HEADS,)),
    )


def test_gated_delta_rule():
    agree(
        lambda q, k, v, beta, g: delta_rule(
            unit_length(q), unit_length(k), v, jax.nn.sigmoid(beta), log_decay=-jax.nn.softplus(g)
        )[0],
        lambda q, k, v, beta, g: naive_recurrent_gated_delta_rule(
            unit(q), unit(k), v, beta.sigmoid(), -torch.nn.functional.softplus(g)
        )[0],
        arrays(beta=(HEADS,), g=(HEADS,)),
    )


def test_kimi_delta_attention_of_grouped_values():
    both = 2 * HEADS
    agree(
        lambda q, k, v, beta, g: delta_rule(
            unit_length(q), unit_length(k), v, jax.nn.sigmoid(beta), log_decay=-jax.nn.softplus(g)
        )[0],
        lambda q, k, v, beta, g: naive_recurrent_kda(
            unit(q), unit(k), v, -torch.nn.functional.softplus(g), beta.sigmoid()
        )[0],
        arrays(v=(both, VALUE), beta=(both,), g=(both, KEY)),
    )


@pytest.mark.parametrize("lowest", [None, -5.0])
def test_decays_of_kimi_delta_attention(lowest: float | None):
    mixer = KDA(HEADS * KEY, heads=HEADS, lowest_decay=lowest)
    rng = np.random.default_rng(2)
    A_log, bias = rng.standard_normal(HEADS), rng.standard_normal((HEADS, KEY))
    # The two matrices of the decay's projection: ones that hand features on as they are.
    down = np.eye(HEADS * KEY, KEY)
    up = rng.standard_normal((KEY, HEADS, KEY))
    weights = {"A_log": A_log, "step_bias": bias, "fading": {"down": {"kernel": down}, "up": {"kernel": up}}}
    weights = jax.tree.map(jnp.float32, weights)
    x = rng.standard_normal((BATCH, LENGTH, HEADS * KEY)).astype(np.float32)
    gate = naive_kda_gate if lowest is None else partial(naive_kda_lowerbound_gate, lower_bound=lowest)
    step = np.einsum("btr,rhk->bthk", x[..., :KEY], up)
    wanted = gate(torch.tensor(step), torch.tensor(A_log), torch.tensor(bias.reshape(-1)))
    close(mixer.apply({"params": weights}, jnp.asarray(x), method="log_decay"), wanted.numpy())
