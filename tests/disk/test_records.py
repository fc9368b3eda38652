"""Records are read from JSON-like values with every type and range checked, and errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from deeplens_lightning.disk.json_text import check_digest, parse_object, signed
from deeplens_lightning.disk.records import Count, Digest, RecordError, Within, read_record, to_plain


@dataclass(frozen=True, kw_only=True)
class Inner:
    rows: Count
    share: Annotated[float, Within(0, 1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Other:
    name: str
    rows: Count


@dataclass(frozen=True, kw_only=True)
class Outer:
    kind: Literal["a", "b"]
    pairs: tuple[tuple[int, str], ...]
    inner: Inner | None
    either: Inner | Other
    by_name: Mapping[str, Inner]
    flag: bool
    anything: Any = None
    sha256: Digest = "0" * 64


GOOD: dict[str, Any] = {
    "kind": "a",
    "pairs": [[1, "x"], [2, "y"]],
    "inner": {"rows": 3, "share": 1},
    "either": {"name": "n", "rows": 0},
    "by_name": {"q": {"rows": 2**63 - 1}},
    "flag": True,
    "anything": {"a": [1, None, 2.5]},
}


def test_a_record_is_read_and_written_back() -> None:
    outer = read_record(Outer, GOOD)
    assert outer.pairs == ((1, "x"), (2, "y"))
    assert outer.inner == Inner(rows=3, share=1.0)
    assert outer.either == Other(name="n", rows=0)
    assert read_record(Outer, to_plain(outer)) == outer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, "kind is 'c', expected one of 'a', 'b'"),
        ({"kind": ["a"]}, "kind is"),
        ({"pairs": [[1, "x", 2]]}, r"pairs\[0\] is .* expected a list of 2"),
        ({"pairs": [[True, "x"]]}, r"pairs\[0\]\[0\] is True, expected an integer"),
        ({"pairs": "xy"}, "expected a list"),
        ({"inner": {"rows": -1}}, "inner.rows is -1, expected at least 0"),
        ({"inner": {"rows": 2**63}}, "expected an integer of 64 bits"),
        ({"inner": {"rows": 1.0}}, "expected an integer"),
        ({"inner": {}}, "inner.rows is missing"),
        ({"inner": {"rows": 1, "row": 2}}, "inner.row is not known; there are rows, share"),
        ({"inner": {"rows": 1, "share": float("nan")}}, "expected a finite number"),
        ({"inner": {"rows": 1, "share": 1.5}}, "expected from 0 to 1"),
        ({"either": {"name": 3, "rows": 1}}, "either.name is 3, expected a string"),
        ({"by_name": {"q": None}}, "by_name.q is None, expected an object"),
        ({"by_name": {1: {"rows": 1}}}, "expected an object"),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"anything": object()}, "expected a JSON value"),
        ({"sha256": "xyz"}, "64 hexadecimal digits"),
    ],
)
def test_anything_else_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_record(Outer, {**GOOD, **change})


def test_deeply_nested_values_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RecordError, match="anything is nested more than 64 levels deep"):
        read_record(Outer, {**GOOD, "anything": deep})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "a key twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_text_that_is_not_a_json_object_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_object(data)


def test_a_digest_finds_every_change() -> None:
    content = signed({"rows": 3, "shards": [{"file": "x"}]})
    check_digest(dict(reversed(content.items())))
    for altered in ({**content, "rows": 4}, {**content, "more": 1}, {"rows": 3}):
        with pytest.raises(RecordError, match="altered"):
            check_digest(altered)
