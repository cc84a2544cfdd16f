"""Strict decoding of what a person wrote: every complaint names the field, what was got and what was expected."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec.structs import FieldInfo

from ipc.errors import EngineError

T = TypeVar("T", bound=msgspec.Struct)

_SHOWN = 60


def decode_strictly(type_: type[T], data: object, error: type[EngineError], what: str) -> T:
    """`data`, a mapping of field names, as a `type_`; raises `error` about the first field that does not fit.

    `what` names the whole in messages ("the request", "the file system.yaml").
    """
    if not isinstance(data, Mapping):
        raise error(f"{what} must be a table of named values, not {_show(data)}")
    fields = _fields(type_)
    for key in data:
        if key not in fields:
            raise error(f"{what} has an unknown field {_show(key)}{_nearest(key, fields)}")
    for name, field in fields.items():
        if name in data:
            _check_field(name, field.type, data[name], error, what)
        elif field.required:
            raise error(f"{what} lacks {name!r}")
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as cause:
        raise error(f"{what}: {cause}") from cause


@functools.cache
def _fields(type_: type[msgspec.Struct]) -> Mapping[str, FieldInfo]:
    """By name. Every look evaluates all annotations, which takes a millisecond or two."""
    return {field.name: field for field in msgspec.structs.fields(type_)}


def _check_field(name: str, type_: Any, value: object, error: type[EngineError], what: str) -> None:
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        decode_strictly(type_, value, error, f"{what}, {name},")
        return
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError as cause:
        choices = _choices(type_)
        if choices:
            near = _nearest(value, choices) if isinstance(value, str) else ""
            near = f"; write it as a number: {value}" if value in choices else near
            raise error(f"{what}: {name} must be one of {', '.join(choices)}; got {_show(value)}{near}") from cause
        expected = str(cause).split(", got `", 1)[0].split(" - at `", 1)[0].removeprefix("Expected ").replace("`", "")
        expected = expected.replace(" | null", "")
        if expected == "array" and isinstance(value, str):
            raise error(f"{what}: {name} must be a list, also of one: [{_show(value)}]; got {_show(value)}") from cause
        raise error(f"{what}: {name} must be {expected}; got {_show(value)} ({type(value).__name__})") from cause


def _choices(type_: Any) -> tuple[str, ...]:
    """The strings of a `Literal`, also inside an optional."""
    if typing.get_origin(type_) is typing.Literal:
        return tuple(str(choice) for choice in typing.get_args(type_))
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        return tuple(choice for member in typing.get_args(type_) for choice in _choices(member))
    return ()


def _nearest(given: object, known: Mapping[str, object] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
