"""The NNX face: what a Linen module gives, its gradients and its training are the same through `zoo.nnx`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_encoders
import test_tokenizers
from flax import nnx
from jax.sharding import PartitionSpec
from quick import compiled, init

import zoo
from zoo.errors import ZooError
from zoo.layers.mixer import create_mixer

ENCODERS = {case.name: case for case in test_encoders.CASES}
TOKENIZERS = {case.name: case for case in test_tokenizers.CASES}
SEQUENCE = "sequence"
DEFAULT = ("eegnet_tiny", "mu_law", SEQUENCE)


def small(name: str, **options: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A small module, and what it is given."""
    if name == SEQUENCE:
        tokens = np.random.default_rng(0).integers(0, 7, (2, 12))
        module = zoo.create("sequence_tiny", vocabulary=7, dim=16, mixers=("softmax",) * 2)
        return module, (tokens.astype(np.int32),), {}
    case, cases = (ENCODERS[name], test_encoders) if name in ENCODERS else (TOKENIZERS[name], test_tokenizers)
    module: Any = zoo.create(name, **{**case.options, **options})
    who = {"subject": np.arange(2, dtype=np.int32)} if getattr(module, "subjects", 0) else {}
    return module, cases.batch(case, 2), who


def same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda *pair: np.testing.assert_array_equal(*map(np.asarray, pair)), found, wanted)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow])
        for name in (*ENCODERS, *TOKENIZERS, SEQUENCE)
    ],
)
def test_a_model_is_the_same_to_the_bit_and_holds_the_very_arrays(name):
    module, given, who = small(name)
    variables = init(module, *given, **who)
    model = zoo.nnx(module, variables)
    assert {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))} == {id(leaf) for leaf in jax.tree.leaves(variables)}
    again = zoo.variables(model)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(again), jax.tree.leaves(variables)))

    graph, state = nnx.split(model)
    found = compiled(lambda state, *given: nnx.merge(graph, state)(*given, **who))(state, *given)
    same(found, compiled(lambda variables, *given: module.apply(variables, *given, **who))(variables, *given))


def test_names_of_axes_stay_without_a_mesh():
    module, x = create_mixer("softmax", 8, heads=2), jnp.ones((1, 3, 8))
    boxed = compiled(module.init)(jax.random.key(0), x)
    model = zoo.nnx(module, boxed)
    same(zoo.variables(model), boxed)
    names = boxed["params"]["key"]["kernel"].names
    assert names == ("embed", "heads", "head_width")
    assert zoo.variables(model)["params"]["key"]["kernel"].names == names
    assert nnx.get_partition_spec(nnx.state(model, nnx.Param))["key"]["kernel"].get_value() == PartitionSpec(*names)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(lambda model: model(x).sum())(model)))(
        model, optimizer
    )
    assert zoo.variables(model)["params"]["key"]["kernel"].names == names


def test_methods_of_the_module_are_methods_of_the_model():
    module, given, _ = small("mu_law")
    variables = module.fit(given[0])
    codes = zoo.nnx(module, variables).encode(*given)
    same(codes, module.apply(variables, *given, method="encode"))
    assert len(np.unique(codes)) > 4


def test_a_mixer_and_its_gradient():
    module = create_mixer("softmax", 8, heads=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    variables = init(module, x)

    @nnx.jit
    def found(model):
        return nnx.grad(lambda model: (model(x) ** 2).sum())(model)

    wanted = jax.jit(jax.grad(lambda params: (module.apply({"params": params}, x) ** 2).sum()))(variables["params"])
    same(nnx.to_pure_dict(found(zoo.nnx(module, variables))), wanted)
    with pytest.raises(ZooError, match=r"^\w+: [^\n]+$"):
        zoo.nnx(module, {"params": {}})(x)


class Normed(nn.Module):
    """A linear map with batch norm behind it."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


@pytest.mark.parametrize("name", ["normed", pytest.param("eegnet_tiny", marks=pytest.mark.slow)])
def test_steps_of_an_nnx_optimizer_are_those_of_optax(name):
    if name == "normed":
        module, given = Normed(), (np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),)
    else:
        # Nothing is dropped, so that both draw the same: nothing.
        module, given, _ = small(name, dropout=0.0)
    variables = init(module, *given)
    rule = optax.adamw(1e-2)
    model = zoo.nnx(module, variables, rngs=nnx.Rngs(dropout=0))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    traced = []

    @nnx.jit
    def step(model, optimizer):
        traced.append(1)
        value, gradient = nnx.value_and_grad(lambda model: loss(model(*given, train=True)))(model)
        optimizer.update(model, gradient)
        return value

    @jax.jit
    def linen_step(params, rest, moments):
        def apply(params):
            out, new = module.apply({"params": params, **rest}, *given, train=True, mutable=list(rest))
            return loss(out), new

        (value, new), gradient = jax.value_and_grad(apply, has_aux=True)(params)
        updates, moments = rule.update(gradient, moments, params)
        return value, optax.apply_updates(params, updates), new, moments

    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    moments = rule.init(params)
    values = []
    for _ in range(3):
        value, params, rest, moments = linen_step(params, rest, moments)
        values.append(float(step(model, optimizer)))
        assert values[-1] == float(value)
    assert values[-1] < values[0]
    assert len(traced) == 1
    same(zoo.variables(model), {"params": params, **rest})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labram_vqnsp_tiny", "ephys_tokenizer_tiny"])
def test_codebooks_and_schedules_move_in_training_as_in_linen(name):
    module, given, _ = small(name)
    variables = init(module, *given)
    held = [collection for collection in variables if collection != "params"]
    streams = {"codes": 1, "dropout": 2, "noise": 3}
    keys = {stream: keys() for stream, keys in nnx.Rngs(**streams).items()}

    def linen(variables):
        return module.apply(variables, *given, train=True, mutable=held, rngs=keys)

    out, new = compiled(linen)(variables)
    graph, state = nnx.split(zoo.nnx(module, variables))

    def bridged(state):
        model = nnx.merge(graph, state)
        out = model(*given, train=True, rngs=nnx.Rngs(**streams))
        return out, zoo.variables(model)

    found, after = compiled(bridged)(state)
    same(found, out)
    same(after, {**variables, **new})
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after, variables)), strict=True))


def test_what_is_dropped_follows_the_streams_it_was_given():
    x = np.ones(64, np.float32)

    def drawn(seed):
        model = zoo.nnx(nn.Dropout(0.5, deterministic=False), {}, rngs=nnx.Rngs(dropout=seed))
        return [np.asarray(model(x)) for _ in range(2)]

    first, again, other = drawn(0), drawn(0), drawn(1)
    same(first, again)
    assert (first[0] != first[1]).any()
    assert (first[0] != other[0]).any()


def test_wrong_variables_are_refused_in_one_line():
    module, given, _ = small("eegnet_tiny")
    variables = init(module, *given)
    params = variables["params"]
    for wrong, says in (
        ([], "got variables list, wanted collections"),
        (params["bank"], "got variables {bias, scale, spatial, temporal}, wanted collections"),
        ({"params": params}, r"wanted variable batch_stats/\S+ \[\d+\], it is not there and \d more are wrong"),
        ({**variables, "params": {**params, "late": jnp.zeros(3)}}, r"params/late \[8, 8\], got \[3\]$"),
        ({**variables, "note": {"of": "text"}}, "'text'"),
    ):
        with pytest.raises(ZooError, match=says) as refused:
            zoo.nnx(module, wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(ZooError, match=r"got a Linear, wanted what zoo\.nnx made"):
        zoo.variables(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def loss(out: Any) -> Any:
    return (jnp.abs(getattr(out, "pooled", out) - 1) ** 1.5).mean()
