"""Command-line options from dataclasses, with complaints on one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from zoo.errors import ZooError

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """An instance of the dataclass `kind` from command-line options, `default` giving what they leave out.

    Raises ZooError for a wrong value, and for an option that does not exist with the nearest one that does.
    """
    import tyro

    known = [*option_names(kind if default is None else default), "help"]
    for option in arguments:
        name = option.split("=")[0].removeprefix("--").replace("_", "-")
        if option.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ZooError(f"{prog}: unknown option --{name}; the nearest is --{near}")
    complaint = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(arguments), prog=prog, config=(tyro.conf.AvoidSubcommands,), **given)
    except SystemExit as stop:
        if stop.code:
            raise ZooError(f"{prog}: {_first_sentence(complaint.getvalue())}") from None
        raise


def option_names(value: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted option of a dataclass, instance of one, or mapping; booleans also with their `no-` form."""
    if isinstance(value, Mapping):
        inner = dict(value)
    else:
        of_type = isinstance(value, type)
        inner = {
            each.name: each.default if of_type else getattr(value, each.name) for each in dataclasses.fields(value)
        }
    for key, each in inner.items():
        name = key.replace("_", "-")
        if dataclasses.is_dataclass(each) or (isinstance(each, Mapping) and each):
            yield from option_names(each, f"{prefix}{name}.")
        else:
            yield prefix + name
            if isinstance(each, bool):
                yield f"{prefix}no-{name}"


def _first_sentence(box: str) -> str:
    """What tyro's framed complaint says before its rule, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    return " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines)) or box
