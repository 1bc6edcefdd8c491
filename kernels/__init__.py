"""Sparse and linear attention kernels for JAX: functions on arrays that know jax and nothing else.

Each operation is a folder here (definition, XLA form, Pallas TPU form) and is usable without `zoo`.
"""

DISTRIBUTION = "brain-zoo"
