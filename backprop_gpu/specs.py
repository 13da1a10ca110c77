"""Settings written as text, NAME[:key=value,...]: optimizers, schedules and costs, in Python and on the command line.

A value is a number, true or false, a name, or a pair of numbers with a slash between them: 0.9/0.99.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .errors import ConfigError, lookup

V = TypeVar("V")


def parse(what: str, text: object) -> tuple[str, dict[str, str]]:
    """Name and settings, {key: raw text}, of NAME[:key=value,...]; white space around them does not count.

    Raises ConfigError for anything else: no text, no name, no value, a key twice, settings within a setting.
    """
    cure = "write NAME or NAME:key=value,key=value"
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {text!r}, not a name", cure)
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not name:
        raise ConfigError(f"{what} {text!r} has no name", cure)
    settings: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if ":" in value:
            raise ConfigError(f"{what} {text!r}: {key} has settings of its own", "give a name alone, or nest in Python")
        if not (key and equals and value) or "=" in value:
            raise ConfigError(f"{what} {text!r}: {part.strip()!r} is not key=value", cure)
        if key in settings:
            raise ConfigError(f"{what} {text!r} gives {key} twice", "give it once")
        settings[key] = value
    return name, settings


def values(what: str, settings: Mapping[str, str], make: Callable[..., object]) -> dict[str, Any]:
    """The settings as arguments of `make`, each read as the annotation or the default of its parameter says.

    Raises ConfigError, which begins with `what`, for a key that is no parameter and a value of another kind.
    """
    parameters = inspect.signature(make).parameters
    if settings and not parameters:
        raise ConfigError(f"{what} has no settings", "write its name alone")
    return {key: _read(what, lookup(f"setting of {what}", key, parameters), raw) for key, raw in settings.items()}


def build(what: str, text: object, table: Mapping[str, Callable[..., V]]) -> V:
    """What the table's maker of NAME makes of the settings. Raises ConfigError: see `parse`, `values`, the maker."""
    name, settings = parse(what, text)
    make = lookup(what, name, table)
    given = values(f"{what} {name}", settings, make)
    for key, parameter in inspect.signature(make).parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise ConfigError(f"{what} {name} lacks {key}", f"write {name}:{key}=...")
    return make(**given)


def number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = True,
) -> float:
    """`value` as a Python float, if it is a finite number in the range, ends in or out; else ConfigError."""
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    above, below = low < found if low_open else low <= found, found < high if high_open else found <= high
    if not (math.isfinite(found) and above and below):
        top = "" if math.isinf(high) else f" to {'below ' if high_open else ''}{high:g}"
        raise ConfigError(
            f"{owner}: {name} is {value!r}", f"give a finite number {'above' if low_open else 'from'} {low:g}{top}"
        )
    return found


def _pair(raw: str) -> tuple[float, ...]:
    first, second = raw.split("/")
    return float(first), float(second)


_KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "bool": ("true or false", lambda raw: {"true": True, "false": False}[raw.lower()]),
    "int": ("an integer", int),
    "float": ("a number", float),
    "str": ("a name", str),
    "tuple": ("two numbers, such as 0.9/0.99", _pair),
}


def _read(what: str, parameter: inspect.Parameter, raw: str) -> Any:
    annotation, default = parameter.annotation, parameter.default
    kind = re.split(r"\W", annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))[0]
    if kind not in _KINDS:
        kind = "float" if default is parameter.empty else type(default).__name__
    wanted, read = _KINDS[kind]
    try:
        return read(raw)
    except (ValueError, KeyError):
        raise ConfigError(f"{what}: {parameter.name} is {raw!r}", f"give {wanted}") from None
