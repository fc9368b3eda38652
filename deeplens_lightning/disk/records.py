"""Read frozen dataclasses from JSON-like values that may be damaged, and convert them back.

In: dicts, lists, strings and numbers that were read from a file. Out: dataclasses in which every field has its annotated
type and lies in its range. A missing key, an unknown key, another type and a number out of range are errors that name the
field; nothing is converted silently.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

INT64 = 2**63
"""One above the largest int64. Integers are below it unless a `Within` says otherwise."""
DEPTH = 64
"""Largest depth of nested values in a field of type `Any`."""


class RecordError(ValueError):
    """A value read from a file does not have the type or range of its field; the message names the field."""


@dataclass(frozen=True, slots=True)
class Within:
    """Annotation for the range of a number: `Annotated[int, Within(0)]` is an int64 from 0 upwards.

    Attributes:
        least: smallest value.
        most: largest value.
    """

    least: float
    most: float = INT64 - 1

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == INT64 - 1 else f"from {self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class Matching:
    """Annotation for the form of a string: `Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]`.

    Attributes:
        pattern: regular expression that the whole string matches.
        words: the same in words, for messages.
    """

    pattern: str
    words: str


Count = Annotated[int, Within(0)]
"""A number of things, or a number counted from 0."""
Positive = Annotated[int, Within(1)]
"""A number of things of which there is at least one."""
Digest = Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]
"""A SHA-256 as `sha256sum` prints it."""


def read_record(kind: type[T], value: object, where: str = "") -> T:
    """Read a dataclass from a mapping with one entry for each field.

    Fields may be bool, int, float, str, `Any` (JSON-like values), `Literal`, `tuple`, `Mapping[str, ...]`, other
    dataclasses, a union of these, and `Annotated` ones. A tuple may be given as a list. Fields with a default may be
    missing. A union takes the first member that the value can be read as.

    Args:
        kind: the dataclass.
        value: the value read from a file.
        where: name of the value in messages, such as `position.rows`; empty for the outermost one.

    Raises:
        RecordError: the value is not such a record.
    """
    if not isinstance(value, Mapping):
        raise _refused(where, value, "an object")
    hints = _hints(cast(Any, kind))
    for key in value:
        if key not in hints:
            raise RecordError(
                f"{_at(where, str(key))} is not known; there are {', '.join(hints) or 'no entries'}"
            )
    found: dict[str, Any] = {}
    for name, (hint, required) in hints.items():
        if name in value:
            found[name] = _read(hint, value[name], _at(where, name))
        elif required:
            raise RecordError(f"{_at(where, name)} is missing")
    try:
        return kind(**found)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{where}: {error}" if where else str(error)) from error


def to_plain(value: Any) -> Any:
    """Convert a record to JSON-like values that `read_record` reads: dicts for dataclasses, lists for tuples."""
    if is_dataclass(value) and not isinstance(value, type):
        # Not `asdict`, which copies values of other types.
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


@cache
def _hints(kind: type) -> Mapping[str, tuple[Any, bool]]:
    """Annotation of each field of a dataclass, and whether the field has no default."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(cast(Any, kind))
        if field.init
    }


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _read(arguments[0], value, where)
        for limit in arguments[1:]:
            _check_limit(limit, found, where)
        return found
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is Literal:
        if not isinstance(value, str | int) or value not in arguments:
            raise _refused(where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _refused(where, value, "an object")
        return {key: _read(arguments[1], item, _at(where, key)) for key, item in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return read_record(hint, value, where)
    return _read_plain(hint, value, where)


def _read_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        _check_json(value, where)
        return value
    if hint is None or hint is type(None):
        if value is not None:
            raise _refused(where, value, "null")
        return None
    if hint is bool or hint is str:
        if type(value) is not hint:
            raise _refused(where, value, "true or false" if hint is bool else "a string")
        return value
    if hint is int:
        if type(value) is not int or not -INT64 <= value < INT64:
            raise _refused(where, value, "an integer of 64 bits")
        return value
    if hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _refused(where, value, "a finite number")
        return float(value)
    raise TypeError(f"{where}: fields of type {hint} cannot be read")  # a mistake in the record's class


def _read_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is not type(None):
            try:
                return _read(member, value, where)
            except RecordError as error:
                errors.append(error)
    if len(errors) > 1 and isinstance(
        value, Mapping
    ):  # the record that shares most keys with the value explains best
        shared = [len(value.keys() & _keys(member)) for member in members]
        raise errors[max(range(len(errors)), key=shared.__getitem__)]
    raise errors[0]


def _keys(member: Any) -> set[str]:
    """The keys of a record; none for a type that is not a record."""
    return {field.name for field in fields(member)} if is_dataclass(member) else set()


def _read_tuple(members: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _refused(where, value, "a list")
    if members[-1] is Ellipsis:
        members = members[:1] * len(value)
    if len(value) != len(members):
        raise _refused(where, value, f"a list of {len(members)}")
    return tuple(
        _read(member, item, f"{where}[{number}]")
        for number, (member, item) in enumerate(zip(members, value, strict=True))
    )


def _check_limit(limit: object, value: Any, where: str) -> None:
    if isinstance(limit, Within) and not limit.least <= value <= limit.most:
        raise _refused(where, value, str(limit))
    if isinstance(limit, Matching) and re.fullmatch(limit.pattern, value) is None:
        raise _refused(where, value, limit.words)


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    if depth > DEPTH:
        raise RecordError(f"{where} is nested more than {DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise _refused(where, key, "a string as key")
            _check_json(item, where, depth + 1)
    elif isinstance(value, tuple | list):
        for item in value:
            _check_json(item, where, depth + 1)
    elif not isinstance(value, bool | int | float | str | None):
        raise _refused(where, value, "a JSON value")


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _refused(where: str, value: object, wanted: str) -> RecordError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return RecordError(f"{where or 'the content'} is {shown}, expected {wanted}")
