"""Linear recurrences, linear attention and nearest-code search for JAX: functions on arrays that know jax alone.

    from kernels.linear_attention import linear_attention, linear_attention_step
    from kernels.delta_rule import delta_rule, delta_rule_step
    from kernels.linear_scan import linear_scan, linear_scan_step
    from kernels.selective_scan import selective_scan, selective_scan_step
    from kernels.nearest_code import code_statistics, nearest_code
    from kernels import sequence  # the first three with time split over the devices of a mesh

Each operation is a folder: its definition step by step (`reference.py`), a form in plain XLA (`xla.py`), Pallas TPU
kernels forward and backward (`tpu.py`). `implementation=None` takes the best for the platform the program is compiled
for; a named one runs or raises. Gates are log decays, states and sums float32. Inside `jax.shard_map` they need
`check_vma=False`.
"""

DISTRIBUTION = "brain-zoo"
