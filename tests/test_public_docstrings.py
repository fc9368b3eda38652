"""Docstrings of public arguments list what a string may be, because help() and `--data.help` show nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import deeplens_lightning
from deeplens_lightning import callbacks, normalization, options, sae, shards
from deeplens_lightning.cli.commands import FUNCTIONS
from deeplens_lightning.model.hook_points import KINDS
from deeplens_lightning.sae import activations
from deeplens_lightning.sae.architectures import ACTIVATIONS

PACKAGE = deeplens_lightning.__name__
GRAMMARS = {
    "hook": (*KINDS, "canonical name", "TransformerLens name", "module path"),
    "input_hook": ("canonical name", "layers."),
    "output_hook": ("canonical name",),
    "device": ("cpu", "cuda", "mps"),
    "hf_model": ("hub id", "folder", "demo:lm"),
    "model_name": ("hub id", "folder", "demo:lm"),
    "dataset_name": ("hub id", "glob", "txt", "jsonl", "parquet", "demo:docs"),
    "dataset_split": ("train",),
    "tokenizer": ("hub id", "folder"),
    "architecture": (*ACTIVATIONS, "matryoshka", "name"),
}
"""Words that the description of an argument with this name contains, where a string is allowed."""


def _public() -> Iterator[tuple[str, Callable[..., Any]]]:
    modules: tuple[ModuleType, ...] = (
        deeplens_lightning,
        callbacks,
        options,
        normalization,
        sae,
        shards,
        activations,
    )
    for module in modules:
        for name in getattr(module, "__all__", None) or vars(module):
            thing = getattr(module, name)
            own = (inspect.getmodule(thing) or re).__name__.startswith(PACKAGE)
            if own and callable(thing) and not name.startswith("_"):
                yield f"{module.__name__}.{name}", thing
    for command, path in FUNCTIONS.items():
        yield f"deeplens-lightning {command}", resolve_name(path)


def _described(function: Callable[..., Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, type and description of the arguments of a function, of a constructor and of public methods."""
    if inspect.isclass(function):
        text = f"{function.__doc__}\n{function.__init__.__doc__}"
        yield from _arguments(function.__init__, text)
        for name, method in inspect.getmembers(function, inspect.isroutine):
            if not name.startswith("_") and (inspect.getmodule(method) or re).__name__.startswith(PACKAGE):
                yield from _arguments(method, method.__doc__ or "")
    else:
        yield from _arguments(function, function.__doc__ or "")


def _arguments(function: Callable[..., Any], text: str) -> Iterator[tuple[str, Any, str]]:
    try:
        hints = get_type_hints(function)
    except NameError:  # a name that only type checkers import
        return
    for name, kind in hints.items():
        found = re.findall(rf"^( +){name}: (.+\n(?:\1 +.+\n)*)", text + "\n", re.MULTILINE)
        yield name, kind, " ".join(" ".join(lines for _, lines in found).split())


def _words(kind: Any) -> set[str]:
    """The strings of the Literals in a type."""
    if get_origin(kind) is Literal:
        return {value for value in get_args(kind) if isinstance(value, str)}
    return {word for part in get_args(kind) for word in _words(part)}


def _allows(kind: Any, wanted: type) -> bool:
    return kind is wanted or any(_allows(part, wanted) for part in get_args(kind))


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_allowed_word_is_in_the_description(name: str) -> None:
    for argument, kind, text in _described(PUBLIC[name]):
        if argument == "return":
            continue
        missing = {word for word in _words(kind) if not re.search(rf"\b{word}\b", text)}
        assert not missing, f"{argument}: {text}"


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if "shards" not in name))
def test_a_string_with_a_grammar_is_described(name: str) -> None:
    thing = PUBLIC[name]
    function = thing.__init__ if inspect.isclass(thing) else thing
    text = f"{thing.__doc__}\n{function.__doc__}"
    for argument, kind, description in _arguments(function, text):
        if argument in GRAMMARS and _allows(kind, str):
            missing = [word for word in GRAMMARS[argument] if word not in description]
            assert not missing, f"{argument}: {description}"


def test_the_settings_of_every_architecture_are_in_the_description_of_architecture() -> None:
    [text] = [text for name, _, text in _described(sae.Dictionary) if name == "architecture"]
    for kind in ACTIVATIONS.values():
        for setting in inspect.signature(kind).parameters.keys() - {"d_sae", "d_in", "k"}:
            assert f"`{setting}`" in text
