"""Key maps: which tensor of a file is which leaf of our variables, as data, and strictly.

    KEYS = (
        Key("patch_embed.proj.weight", "params/embed/kernel", "o i 1 t -> t i o"),
        Key("blocks.{l}.attn.qkv.weight", "params/blocks/query/kernel[{l}]", "(h k) d -> d h k", part=(0, 3)),
        Ignore("head.num_batches_tracked", "a counter"),
    )
    variables, ledger = fill(KEYS, tensors, encoder.init(key, *encoder.example()))

Every number of every tensor of the file is used exactly once, every number of every leaf is filled exactly once, and
shapes agree, or nothing is returned and `WeightsMismatch` lists all that is wrong. What a file has and we do not take,
and what we have and no file gives, is named in the map, with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange

from zoo.errors import ZooError
from zoo.types import Variables


@dataclass(frozen=True)
class Key:
    """One tensor of a file, or a part of it, and where it goes.

    source  its name; {l} and the like stand for any number
    target  the leaf, `collection/module/…/name`; the same {l} are replaced; `[{l}]` at the end is an index of the
            leaf's first axis, where layers are stacked
    how     how its axes move, in einops' notation: "o i -> i o"; "" leaves them as they are
    part    (i, n): the i-th of n equal parts of its first axis, where a file holds several side by side
    """

    source: str
    target: str
    how: str = ""
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Ignore:
    """Tensors of a file that we have no place for, and why. same_as: a tensor they must equal, where they repeat it."""

    source: str
    why: str
    same_as: str = ""


@dataclass(frozen=True)
class Fresh:
    """A leaf that no file gives, which stays as it was made, and why."""

    target: str
    why: str


Rule = Key | Ignore | Fresh


@dataclass(frozen=True)
class Row:
    """One line of the ledger: what was done with a tensor, or a leaf."""

    source: str
    source_shape: tuple[int, ...]
    target: str
    target_shape: tuple[int, ...]
    norm: float
    done: str


class WeightsMismatch(ZooError):
    """Tensors and leaves do not fit. `problems`: each of them, a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"weights do not fit, {count} mismatch{'es' * (count > 1)}")

    def __str__(self) -> str:
        return "\n  ".join([f"{self.args[0]}:", *self.problems])


def fill(
    rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], variables: Variables
) -> tuple[Variables, tuple[Row, ...]]:
    """Variables of the shapes, dtypes and names of `variables`, filled from `tensors`; and the ledger.

    variables may be abstract (`jax.eval_shape`) where no rule is `Fresh`; boxes of logical axes are taken off. Raises
    WeightsMismatch, listing everything that is wrong.
    """
    leaves = flax.traverse_util.flatten_dict(nn.meta.unbox(variables), sep="/")
    filling = _Filling(tensors, leaves)
    for rule in rules:
        filling.apply(rule)
    problems = [*filling.problems, *filling.left_over()]
    if problems:
        raise WeightsMismatch(problems)
    return flax.traverse_util.unflatten_dict(filling.filled, sep="/"), tuple(filling.rows)


def below(rules: Iterable[Rule], module: str, source: str = "") -> tuple[Rule, ...]:
    """The rules for the same module called `module` inside another, its tensors' names beginning with `source`."""

    def moved(target: str) -> str:
        collection, _, rest = target.partition("/")
        return f"{collection}/{module}/{rest}"

    def inner(rule: Rule) -> Rule:
        if isinstance(rule, Fresh):
            return replace(rule, target=moved(rule.target))
        if isinstance(rule, Ignore):
            return replace(rule, source=source + rule.source, same_as=rule.same_as and source + rule.same_as)
        return replace(rule, source=source + rule.source, target=moved(rule.target))

    return tuple(map(inner, rules))


def kept(rules: Iterable[Rule], leaves: Iterable[str]) -> tuple[str, ...]:
    """Which of the leaves a map leaves as they were made."""
    patterns = [_pattern(rule.target) for rule in rules if isinstance(rule, Fresh)]
    return tuple(leaf for leaf in leaves if any(pattern.fullmatch(leaf) for pattern in patterns))


class _Filling:
    """The state of one `fill`: what of each tensor was used, what of each leaf is filled."""

    def __init__(self, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> None:
        self.tensors, self.leaves = tensors, leaves
        self.filled: dict[str, np.ndarray] = {}
        self.places: dict[str, dict[int | None, str]] = {name: {} for name in leaves}
        self.used: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}
        self.problems: list[str] = []
        self.rows: list[Row] = []

    def apply(self, rule: Rule) -> None:
        if isinstance(rule, Fresh):
            self._keep(rule)
            return
        found = [(name, match) for name in self.tensors if (match := _pattern(rule.source).fullmatch(name))]
        if not found and isinstance(rule, Key):
            self.problems.append(f"missing tensor {rule.source} (for {rule.target})")
        for name, match in found:
            numbers = match.groupdict()
            if isinstance(rule, Ignore):
                self._ignore(name, rule, numbers)
            else:
                self._place(name, rule, _numbered(rule.target, numbers))

    def _keep(self, rule: Fresh) -> None:
        found = [name for name in self.leaves if _pattern(rule.target).fullmatch(name)]
        if not found:
            self.problems.append(f"no leaf {rule.target} to leave as it was made")
        for name in found:
            leaf = self.leaves[name]
            if not hasattr(leaf, "__array__"):
                self.problems.append(f"{name}: wanted values to leave as they were made, got shapes only")
                continue
            self.filled[name] = np.asarray(leaf)
            self.places[name][None] = "its first value"
            self.rows.append(Row("", (), name, tuple(leaf.shape), _norm(self.filled[name]), f"as made: {rule.why}"))

    def _ignore(self, name: str, rule: Ignore, numbers: Mapping[str, str]) -> None:
        tensor = self.tensors[name]
        if rule.same_as:
            other = _numbered(rule.same_as, numbers)
            if other not in self.tensors or not np.array_equal(tensor, self.tensors[other]):
                self.problems.append(f"{name}: wanted a repetition of {other}, got other numbers")
        self.used[name].append((0, 1))
        self.rows.append(Row(name, tensor.shape, "", (), _norm(tensor), f"left out: {rule.why}"))

    def _place(self, name: str, rule: Key, target: str) -> None:
        tensor, (part, parts) = self.tensors[name], rule.part
        self.used[name].append(rule.part)
        leaf_name, index = _indexed(target)
        leaf = self.leaves.get(leaf_name)
        if leaf is None:
            self.problems.append(f"{name} {list(tensor.shape)}: there is no leaf {leaf_name} to put it in")
            return
        shape = tuple(leaf.shape if index is None else leaf.shape[1:])
        into = f"{target} {list(shape)}"
        taken = self.places[leaf_name]
        if index in taken or None in taken or (index is None and taken):
            self.problems.append(
                f"{name}: {into} is filled already, by {taken.get(index) or next(iter(taken.values()))}"
            )
            return
        taken[index] = name
        if index is not None and not 0 <= index < leaf.shape[0]:
            self.problems.append(f"{name}: {leaf_name} has {leaf.shape[0]} layers, got one more, number {index}")
            return
        if not jnp.issubdtype(tensor.dtype, np.number) and tensor.dtype != bool:
            self.problems.append(f"{name}: wanted numbers, got {tensor.dtype}")
            return
        if not np.isfinite(tensor).all():
            self.problems.append(f"{name}: {int((~np.isfinite(tensor)).sum())} of its numbers are not finite")
            return
        if parts > 1 and (tensor.ndim == 0 or tensor.shape[0] % parts):
            self.problems.append(f"{name} {list(tensor.shape)}: wanted a first axis of {parts} equal parts")
            return
        piece = np.split(tensor, parts)[part] if parts > 1 else tensor
        moved = _moved(piece, rule.how, shape)
        if moved is None or moved.shape != shape:
            told = f", moved as {rule.how!r}" if rule.how else ""
            whole = f" (part {part + 1} of {parts})" if parts > 1 else ""
            self.problems.append(f"{name} {list(tensor.shape)}{whole}{told}: wanted {into}")
            return
        with np.errstate(over="ignore"):
            cast = moved.astype(leaf.dtype)
        exact = np.array_equal(cast, moved)
        if not exact and not (jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isfinite(cast).all()):
            self.problems.append(f"{name}: numbers of {tensor.dtype} that {into} of {leaf.dtype} cannot hold")
            return
        whole_leaf = self.filled.setdefault(leaf_name, np.zeros(leaf.shape, leaf.dtype))
        whole_leaf[... if index is None else index] = cast
        self.rows.append(Row(name, tensor.shape, target, shape, _norm(moved), rule.how or "as it is"))

    def left_over(self) -> list[str]:
        """Tensors that are not used whole or more than once, leaves that are not filled whole."""
        wrong = []
        for name, parts in self.used.items():
            shape = list(self.tensors[name].shape)
            if not parts:
                wrong.append(f"extra tensor {name} {shape}: nothing here takes it")
            elif sorted(parts) != [(each, len(parts)) for each in range(len(parts))]:
                told = ", ".join(f"{part + 1}/{whole}" for part, whole in sorted(parts))
                wrong.append(f"{name} {shape}: wanted every part used once, got {told}")
        for name, leaf in self.leaves.items():
            places = self.places[name]
            if None in places:
                continue
            if not places:
                wrong.append(f"{name} {list(leaf.shape)}: no tensor fills it")
            elif lacking := sorted(set(range(leaf.shape[0])) - set(places), key=int):
                wrong.append(f"{name} {list(leaf.shape)}: no tensor fills layers {', '.join(map(str, lacking))}")
        return wrong


def _moved(tensor: np.ndarray, how: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The tensor with its axes moved; None where it cannot be."""
    if not how:
        return tensor
    names = re.findall(r"\([^)]*\)|\S+", how.split("->")[1])
    if len(names) != len(shape):
        return None
    sizes = {name: size for name, size in zip(names, shape, strict=True) if name.isidentifier()}
    try:
        return rearrange(tensor, how, **sizes)
    except EinopsError:
        return None


def _pattern(name: str) -> re.Pattern[str]:
    """{l} stands for any number; everything else for itself."""
    parts = re.split(r"\{(\w+)\}", name)
    seen: set[str] = set()
    text = ""
    for place, part in enumerate(parts):
        if place % 2 == 0:
            text += re.escape(part)
        else:
            text += rf"(?P={part})" if part in seen else rf"(?P<{part}>\d+)"
            seen.add(part)
    return re.compile(text)


def _numbered(name: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: numbers[match[1]], name)


def _indexed(target: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*)\[(\d+)\]", target)
    return (match[1], int(match[2])) if match else (target, None)


def _norm(array: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(np.abs(array), dtype=np.float64))))
