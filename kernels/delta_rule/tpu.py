"""The delta rule as Pallas TPU kernels."""


def refusal(key_width, value_width, chunk_size, dtype):
    return "not built yet"


def forward(form, q, k, v, beta, log_decay, initial_state):
    raise NotImplementedError


def backward(form, q, k, v, beta, log_decay, initial_state, d_out, d_final):
    raise NotImplementedError
