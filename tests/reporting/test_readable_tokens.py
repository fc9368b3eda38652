"""Tokens become printable strings on one line."""

import unicodedata

import pytest

from deeplens_lightning.reporting.readable_tokens import code_point, readable, token_strings


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"),
        ("Paris ", "Paris·"),
        ("   ", "···"),
        ("a b", "a b"),
        ("\n\t", "⏎⇥"),
        ("\x00", "<U+0000>"),
        ("\u202eevil", "<U+202E>evil"),
        ("\u2028", "<U+2028>"),
        ("שלום", "שלום"),
        ("😀", "😀"),
        ("", ""),
    ],
)
def test_every_token_is_one_printable_line(token: str, shown: str) -> None:
    assert readable(token) == shown
    assert not any(unicodedata.category(char)[0] == "C" for char in readable(token))


def test_long_tokens_are_cut() -> None:
    assert readable("a" * 100) == "a" * 23 + "…"


def test_code_points_are_padded_to_four_digits() -> None:
    assert code_point("\t") == "<U+0009>"


class _Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<0x{i:02X}>" for i in ids]


def test_a_part_of_a_character_is_shown_as_its_vocabulary_entry() -> None:
    assert token_strings(_Bytes(), list("é!".encode())) == ["<0xC3>", "<0xA9>", "!"]  # type: ignore[arg-type]
