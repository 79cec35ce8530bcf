"""Command-line flags derived from dataclass fields.

A setting is declared once, as a field made by :func:`arg`; its flag, type, choices, default and help
text all come from that field and its annotation:

=================  ======================================================================
annotation         flag
=================  ======================================================================
``bool``           ``--flag`` switches it on
``bool | None``    the same; ``--no-flag`` switches it off, for where None is not off
``int``, ``float`` ``--flag 3``
``str``            ``--flag text``
``str | None``     the same; an empty value and ``None`` mean no value
``dict | None``    ``--flag '{"json": "object"}'``
=================  ======================================================================

Anything else names its own converter with ``kind``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aserve.errors import ConfigError

Choices = Sequence[Any] | Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Arg:
    """What the command line knows of a field beyond its annotation and default.

    ``choices`` may be a function, called when the parser is built. ``metavar`` is the value's name in
    ``--help``. ``default_text`` replaces the default in help and tables when it is worked out later;
    the parser's default is then None.
    """

    help: str
    group: str
    choices: Choices | None = None
    kind: Callable[[str], Any] | None = None
    short: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    nargs: str | None = None
    action: str | None = None
    metavar: str | None = None
    default_text: str | None = None

    def choice_list(self) -> list[Any] | None:
        if self.choices is None:
            return None
        return list(self.choices() if callable(self.choices) else self.choices)


def arg(default: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """A dataclass field that is also a flag; keywords are :class:`Arg`'s.

    Without ``default`` the field is required; a list becomes the factory of fresh copies.
    """
    metadata = {"arg": Arg(**declared)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=functools.partial(list, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Declared:
    """One declared argument with everything derived from its field."""

    name: str
    hint: Any
    default: Any
    arg: Arg

    @property
    def flags(self) -> list[str]:
        return ["--" + self.name.replace("_", "-"), *self.arg.aliases, *self.arg.short]

    @property
    def is_switch(self) -> bool:
        return bool in _members(self.hint)

    def kind(self) -> Callable[[str], Any]:
        """The converter from the flag's text to the field's value."""
        if self.arg.kind is not None:
            return self.arg.kind
        members = _members(self.hint)
        plain = [m for m in members if m is not type(None)]
        if plain[0] is str:
            return nullable_str if len(plain) < len(members) else str
        if plain[0] in (int, float):
            return typing.cast("Callable[[str], Any]", plain[0])
        if typing.get_origin(plain[0]) is dict:
            return json_object
        raise TypeError(f"{self.name}: no flag can be derived from {self.hint}; give it a kind")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def declared(cls: type, *, own: bool = False) -> list[Declared]:
    """The arguments ``cls`` declares, in field order; ``own`` leaves out inherited ones."""
    inherited = {
        f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)
    }
    found = []
    for field in dataclasses.fields(cls):
        if own and field.name in inherited:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(Declared(field.name, _hints(cls)[field.name], default, field.metadata["arg"]))
    return found


def add_flags(parser: argparse.ArgumentParser, cls: type, *, own: bool = False) -> None:
    """Adds one flag for every argument ``cls`` declares, under its group's heading."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in declared(cls, own=own):
        title = item.arg.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], item)


def _add_flag(group: argparse._ArgumentGroup, item: Declared) -> None:
    settings: dict[str, Any] = {"dest": item.name, "help": _help_text(item)}
    settings["default"] = None if item.default is dataclasses.MISSING else item.default
    if item.is_switch:
        off = "store_true" if item.hint is bool else argparse.BooleanOptionalAction
        group.add_argument(*item.flags, action=off, **settings)
        return
    settings["type"] = item.kind()
    for name in ("nargs", "action", "metavar"):
        if getattr(item.arg, name) is not None:
            settings[name] = getattr(item.arg, name)
    choices = item.arg.choice_list()
    if choices is not None:
        settings["choices"] = [*choices, None] if settings["type"] is nullable_str else choices
    group.add_argument(*item.flags, **settings)


def _help_text(item: Declared) -> str:
    text = item.arg.help
    if (not item.is_switch or item.arg.default_text) and (item.default is not None or item.arg.default_text):
        text += f" (default: {default_text(item)})"
    return text.replace("%", "%%")


def default_text(item: Declared) -> str:
    """The default as a person reads it."""
    if item.arg.default_text is not None:
        return item.arg.default_text
    if item.is_switch:
        return "off"
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default is None:
        return "none"
    if isinstance(item.default, list):
        return json.dumps(item.default)
    return str(item.default)


def from_namespace(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``cls`` found in ``namespace`` by attribute name; absent ones keep their default."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


# --- converters from text


def nullable_str(text: str) -> str | None:
    """Text, with an empty value and ``None`` meaning no value."""
    return None if text in ("", "None") else text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object; an empty value, ``None`` and ``null`` mean no value."""
    value = None if nullable_str(text) is None else _json(text)
    if value is not None and not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def json_strings(text: str) -> list[str]:
    """A JSON list of strings, such as ``'["*"]'``."""
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"expected a JSON list of strings, got {text!r}")
    return value


def float_tuple(text: str) -> tuple[float, ...] | None:
    """Numbers between commas, such as ``4.0,8.0``; an empty value and ``None`` mean no value."""
    if nullable_str(text) is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers between commas, got {text!r}") from None


# --- checks on values given from Python


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, member) for member in members)
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        inner = typing.get_args(hint)[0]
        return isinstance(value, origin) and all(_fits(item, inner) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    parts = []
    for member in _members(hint):
        name = "None" if member is type(None) else getattr(member, "__name__", str(member))
        parts.append(str(member) if typing.get_origin(member) else name)
    return " or ".join(parts)


def check_types(values: Any) -> None:
    """Raises ConfigError for a field of the dataclass ``values`` whose value has the wrong type."""
    for item in declared(type(values)):
        value = getattr(values, item.name)
        if not _fits(value, item.hint):
            raise ConfigError(f"{item.name} must be {_spelled(item.hint)}, got {value!r}", param=item.name)
