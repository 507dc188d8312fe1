"""Arguments of public functions: unknown names and wrong types are refused before anything is done."""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from owl2.runtime.config import require_known
from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import shorten

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_PATH = 4096
"""Characters; Linux takes no longer one."""
NAMES = {
    str: "a text",
    int: "a whole number",
    bool: "True or False",
    os.PathLike: "a path",
    types.NoneType: "None",
}
"""What a type is called in messages."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Let a public function refuse unknown keywords, and arguments whose type is not the one that it declares.

    Checked are texts, numbers, paths, functions, None, and classes of this project; everything else is left to the
    function, which raises TypeError where an argument is missing or there are too many.

    Raises:
        ConfigError: when called, with the known keywords or the expected type.
    """
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name not in ("self", "cls")]
    name_of_function = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function)

    @functools.wraps(function)
    def checking(*arguments: P.args, **keywords: P.kwargs) -> T:
        for name in keywords:
            require_known(name, known, f"an argument of {name_of_function}")
        for name, value in signature.bind(*arguments, **keywords).arguments.items():
            kinds = alternatives(hints()[name]) if name in known else []
            possible = not kinds or any(fits(value, kind) for kind in kinds)
            if os.PathLike in kinds and isinstance(value, str | os.PathLike):
                possible = is_path(value)
            if not possible:
                raise ConfigError(f"{name} must be {words(kinds)}, got {shorten(value)}")
        return function(*arguments, **keywords)

    return checking


def alternatives(hint: Any) -> list[Any]:  # noqa: ANN401 - any annotation
    """The types that an annotation allows, as far as they are checked; empty if anything is."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        parts = [alternatives(part) for part in get_args(hint)]
        return [kind for part in parts for kind in part] if all(parts) else []
    if get_origin(hint) is Literal:
        return list(dict.fromkeys(type(choice) for choice in get_args(hint)))
    kind = get_origin(hint) or hint
    own = isinstance(kind, type) and kind.__module__.startswith("owl2.")
    return [kind] if own or kind is Callable or kind in NAMES else []


def fits(value: object, kind: Any) -> bool:  # noqa: ANN401 - one of the alternatives
    """Whether a value is of a type; True is no number."""
    if kind is Callable:
        return callable(value)
    if kind is int:
        # Numpy's too. More than 64 bits are never meant, and Python does not show thousands of digits.
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 1 << 63
    return isinstance(value, kind)


def is_path(value: object) -> bool:
    """Whether a path can be made of a text, or a path of itself."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    return isinstance(path, str) and len(path) <= LONGEST_PATH and "\0" not in path


def words(kinds: list[Any]) -> str:
    """What the alternatives are called in a message."""
    named = [kind for kind in kinds if kind is not str or os.PathLike not in kinds]  # a path may be a text
    names = ["a function" if kind is Callable else NAMES.get(kind, f"of type {kind.__name__}") for kind in named]
    return " or ".join(dict.fromkeys(names))
