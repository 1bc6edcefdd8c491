"""Full, causal and windowed attention on NVIDIA GPUs: cuDNN's kernels do that already, forward and backward.

They are reached through `jax.nn.dot_product_attention`, which also says what they do not take. Gradients may differ in
the last bits from call to call, unless XLA is told to be deterministic (`--xla_gpu_deterministic_ops=true`).
"""

from typing import Any

import jax

from kernels.sparse_attention.mask import All, Causal, Full, Mask, Window


def refusal(q: Any, k: Any, v: Any, mask: Mask) -> str | None:
    """Why cuDNN does not serve (another mask, dtype or width, or it is not installed), or None where it does."""
    if _arguments(mask) is None:
        return f"cuDNN has no mask such as {mask}"
    try:
        jax.eval_shape(lambda q, k, v: attention(q, k, v, mask, None), q, k, v)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as reason:
        return f"cuDNN: {reason}"
    if q.shape[1] != k.shape[1]:
        return f"cuDNN counts the time of {q.shape[1]} queries and {k.shape[1]} keys from their ends"
    return None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float | None, implementation: Any = "cudnn"
) -> jax.Array:
    """As `sparse_attention`, for masks of which `refusal` is None."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation, **(_arguments(mask) or {}))


def _arguments(mask: Mask) -> dict[str, Any] | None:
    """What `jax.nn.dot_product_attention` calls the mask, or None where it has no word for it."""
    parts = _parts(mask)
    windows = [part.size for part in parts if isinstance(part, Window) and not part.symmetric]
    if len(windows) + sum(isinstance(part, Causal | Full) for part in parts) < len(parts):
        return None
    causal = {"is_causal": True} if any(isinstance(part, Causal | Window) for part in parts) else {}
    return causal | ({"local_window_size": (min(windows) - 1, 0)} if windows else {})


def _parts(mask: Mask) -> list[Mask]:
    """The masks all of which must see."""
    return _parts(mask.left) + _parts(mask.right) if isinstance(mask, All) else [mask]
