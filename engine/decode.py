"""Strict decoding of what a person wrote: every complaint names the field, what was got and what was expected."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec.structs import FieldInfo

from ipc.errors import EngineError

T = TypeVar("T", bound=msgspec.Struct)

_SHOWN = 60

KINDS = {
    "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a table of named values",
}  # fmt: skip
"""What msgspec calls a type -> what people do."""

UNIONS = (types.UnionType, typing.Union)


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
        if isinstance(value, list | tuple) and (found := re.search(r" - at `\$\[(\d+)\]", str(cause))):
            number = int(found[1])
            _check_field(f"{name}[{number}]", _item_type(type_, number), value[number], error, what)
        raise error(f"{what}: {name} must be {_complaint(type_, value, str(cause))}") from cause


def _complaint(type_: Any, value: object, cause: str) -> str:
    """What is expected and what was got, and how to write what may have been meant."""
    if choices := _choices(type_):
        near = _nearest(value, choices) if isinstance(value, str) else ""
        near = f"; write it as a number: {value}" if value in choices else near
        return f"one of {', '.join(choices)}; got {_show(value)}{near}"
    got = f"{_show(value)} ({type(value).__name__})"
    found = re.match(r"Expected `([^`]*)`(.*)", cause.partition(", got ")[0].partition(" - at ")[0])
    if found is None:
        return f"something else; got {got}: {cause}"
    kind, bound = found[1].removesuffix(" | null"), found[2]
    if said := _said(type_):
        return f"{said}; got {got}"
    return f"{KINDS.get(kind, kind)}{bound}{_how_to_write(kind, type_, value)}; got {got}"


def _how_to_write(kind: str, type_: Any, value: object) -> str:
    """A value of another kind than the one that is expected, which YAML or a person has taken it for."""
    if kind == "array" and _fits([value], type_):
        return f", also of one: [{_show(value)}]"
    if kind == "str" and isinstance(value, bool):
        return ", and words such as yes, no, on and off are text in quotes only"
    if kind == "str" and isinstance(value, int | float | datetime.date):
        return f", which it is in quotes: '{value}'"
    if kind in ("int", "float") and isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                if _fits(read := number(value), type_):
                    return f", written without quotes: {read}"
    return ""


def _fits(value: object, type_: Any) -> bool:
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError:
        return False
    return True


def _said(type_: Any) -> str:
    """What the type says of itself (`Meta.description`, and the first of its `examples`), also inside an optional."""
    for each in getattr(type_, "__metadata__", ()):
        if isinstance(each, msgspec.Meta) and each.description:
            return each.description + (f", such as {each.examples[0]}" if each.examples else "")
    members = typing.get_args(type_) if typing.get_origin(type_) in UNIONS else ()
    return next((said for member in members if (said := _said(member))), "")


def _item_type(type_: Any, number: int) -> Any:
    """Of an item of a list or tuple; `Any` for what is none."""
    if typing.get_origin(type_) is typing.Annotated:
        return _item_type(typing.get_args(type_)[0], number)
    arguments = typing.get_args(type_)
    if typing.get_origin(type_) in UNIONS:
        return next((item for member in arguments if (item := _item_type(member, number)) is not Any), Any)
    if typing.get_origin(type_) not in (tuple, list) or not arguments:
        return Any
    return arguments[0] if len(arguments) == 1 or arguments[-1] is Ellipsis else arguments[number]


def _choices(type_: Any) -> tuple[str, ...]:
    """The strings of a `Literal`, also inside an optional."""
    if typing.get_origin(type_) is typing.Literal:
        return tuple(str(choice) for choice in typing.get_args(type_))
    if typing.get_origin(type_) in UNIONS:
        return tuple(choice for member in typing.get_args(type_) for choice in _choices(member))
    return ()


def _nearest(given: object, known: Mapping[str, object] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
