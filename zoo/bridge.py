"""The NNX face: any model of the zoo as a `flax.nnx.Module` that holds its arrays, and its variables out of it again.

    module, variables = zoo.load("labram_base.pretrained")
    model = zoo.nnx(module, variables, rngs=nnx.Rngs(dropout=0))
    head = nnx.Linear(module.features, 3, rngs=nnx.Rngs(1))
    both = nnx.Dict(model=model, head=head)
    optimizer = nnx.Optimizer(both, optax.adamw(1e-4), wrt=nnx.Param)

    @nnx.jit
    def step(both, optimizer, signal, sensors, labels):
        def loss(both):
            logits = both.head(both.model(signal, sensors, train=True).pooled)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = nnx.value_and_grad(loss)(both)
        optimizer.update(both, gradient)
        return value

    zoo.variables(model)                       # what `module.apply` takes

Source: `flax.nnx.bridge`, whose `ToNNX` this is. What is different: its state is given and not drawn; a call with
`train=True` updates the collections besides `params` (batch statistics, codebooks) as the zoo's training loop does; and
variables boxed with logical axis names need no mesh.
"""

from __future__ import annotations

from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import flax.nnx
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.nnx.bridge import variables as between

from zoo.errors import ZooError
from zoo.types import Array, Variables

OWN = ("to_nnx__", "_pytree__")
"""What names of a bridge's own attributes begin with; all others are of its model's variables."""
MISFITS = (
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeParamShapeError,
    flax.errors.ScopeVariableNotFoundError,
    flax.errors.ScopeCollectionNotFound,
    flax.errors.ModifyScopeVariableError,
)
"""What Linen says of variables that are not the module's, or must not change."""


class Bridged(flax.nnx.bridge.ToNNX):
    """A Linen module with its variables, as an NNX module; made by `nnx`."""

    def __call__(
        self,
        *given: Any,
        rngs: flax.nnx.Rngs | Array | None = None,
        method: Any = None,
        mutable: Any = None,
        **options: Any,
    ) -> Any:
        """What `module.apply(variables, *given, **options)` gives.

        rngs     streams for this call; by default those that the module was made with
        method   another method of the module, by name or as a function; `model.encode(...)` does the same
        mutable  collections to update; by default all but `params` where `train=True` is among the options, else none

        Raises ZooError where the variables are not those that the module wants.
        """
        if mutable is None and options.get("train"):
            mutable = sorted(variables(self).keys() - {"params"}) or None
        try:
            with flax.nnx.use_eager_sharding(False):
                return super().__call__(*given, rngs=rngs, method=method, mutable=mutable, **options)
        except MISFITS as error:
            raise ZooError(f"{_called(self)}: {str(error).partition(' (https://')[0]}") from error


def nnx(module: nn.Module, variables: Variables, *, rngs: flax.nnx.Rngs | None = None) -> Bridged:
    """`module` with these variables as a `flax.nnx.Module`, called as the module is.

    module     any Linen module: an encoder, a tokenizer, a sequence model, a mixer, a classifier
    variables  what `zoo.load` gives or `module.init` made; boxes of logical axis names stay, as metadata of the state
    rngs       streams that calls draw from ("dropout", "codes", "noise"), where they draw

    Its state is these very arrays: `nnx.Param` for `params`, `nnx.BatchStat` for `batch_stats`, a kind of its own for
    every other collection. Arrays that a call of the module's example does not need (the token of a mask) are kept.

    Raises ZooError for variables that are not the module's, naming the first that is wrong and how many are; those of
    a module that has no example, such as a mixer, are checked when it is called.
    """
    whole: Any = flax.core.unfreeze(variables) if isinstance(variables, dict | flax.core.FrozenDict) else variables
    if not isinstance(whole, dict) or not all(isinstance(inner, dict) for inner in whole.values()):
        raise ZooError(f"{type(module).__name__}: got variables {_kind(whole)}, wanted collections of named arrays")
    _check(module, whole)
    bridged = Bridged(module, rngs)
    try:
        copied = jax.tree.map(jnp.asarray, whole)  # boxes too, which flax takes apart
    except TypeError as error:
        raise ZooError(f"{type(module).__name__}: wanted arrays as variables: {error}") from error
    with flax.nnx.use_eager_sharding(False):
        attributes = between.linen_vars_to_nnx_attrs(copied)
    for name, value in attributes.items():
        if hasattr(Bridged, name):
            raise ZooError(f"{type(module).__name__}: a variable is called {name!r}, as something of nnx.Module is")
        setattr(bridged, name, flax.nnx.data(value))
    return bridged


def variables(model: Bridged) -> dict[str, Any]:
    """The variables that a module of `nnx` holds now, as the Linen module's `apply` takes them: the arrays themselves,
    boxed where they were. Raises ZooError for any other module."""
    if not isinstance(model, Bridged):
        raise ZooError(f"variables: got a {type(model).__name__}, wanted what zoo.nnx made")
    held = {name: value for name, value in vars(model).items() if not name.startswith(OWN)}
    found: dict[str, Any] = between.nnx_attrs_to_linen_vars(held)
    return found


def _check(module: Any, given: dict[str, Any]) -> None:
    """Raises ZooError where a variable that the module makes of its example is not given, or has another shape."""
    if not hasattr(module, "example"):
        return
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "codes", "noise")}
    who = {"subject": jnp.zeros(1, jnp.int32)} if getattr(module, "subjects", 0) else {}
    wanted = _shapes(jax.eval_shape(lambda: module.init(keys, *module.example(), **who)))
    got = _shapes(given)
    wrong = [name for name, shape in wanted.items() if got.get(name) != shape]
    if wrong:
        more = f" and {len(wrong) - 1} more are wrong" if wrong[1:] else ""
        is_there = f"got {list(got[wrong[0]])}" if wrong[0] in got else "it is not there"
        raise ZooError(
            f"{type(module).__name__}: wanted variable {wrong[0]} {list(wanted[wrong[0]])}, {is_there}{more}"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(tree), sep="/")
    return {name: jnp.shape(leaf) for name, leaf in flat.items()}


def _called(model: Bridged) -> str:
    return type(model.to_nnx__module).__name__


def _kind(value: Any) -> str:
    return f"{{{', '.join(map(str, value))}}}" if isinstance(value, dict) else type(value).__name__
