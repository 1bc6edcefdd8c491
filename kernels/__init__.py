"""Linear recurrences, sparse attention and nearest-code search for JAX: functions on arrays that know jax alone.

    from kernels.linear_attention import linear_attention, linear_attention_step
    from kernels.delta_rule import delta_rule, delta_rule_step
    from kernels.linear_scan import linear_scan, linear_scan_step
    from kernels.selective_scan import selective_scan, selective_scan_step
    from kernels.sparse_attention import Causal, Window, sparse_attention, sparse_attention_step
    from kernels.native_sparse_attention import native_sparse_attention, native_sparse_attention_step
    from kernels.moba import moba, moba_step
    from kernels.alternating_sparse_attention import global_latent_attention, local_latent_attention
    from kernels.nearest_code import code_statistics, nearest_code
    from kernels import sequence  # linear attention, delta rule and scan with time split over the devices of a mesh

Each operation is a folder: its definition step by step (`reference.py`), a form in plain XLA (`xla.py`), Pallas TPU
kernels forward and backward (`tpu.py`); or a file where it is made of others. `implementation=None` takes the best for
the platform the program is compiled for; a named one runs or raises. Gates of recurrences are log decays, states and
sums float32.

On several devices, split rows and heads by hand: the compiler cannot split Pallas kernels, and of the loops of the
attentions in XLA it gathers what it could leave where it is. Inside `jax.shard_map` they need `check_vma=False`.

    spec = P("data", None, "tensor")  # [B, T, H, K]
    jax.shard_map(native_sparse_attention, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)

Time can be split too. Inside `jax.shard_map`, with `axis` the mesh axis of time: `kernels.split_attention` (a ring, or
the neighbours where a window is short), `kernels.split_blocks` (native sparse attention, MoBA),
`kernels.split_latents`, `kernels.sequence.split_selective_scan`, and `kernels.turns` for what only goes one stretch
after another.
"""

DISTRIBUTION = "brain-zoo"
