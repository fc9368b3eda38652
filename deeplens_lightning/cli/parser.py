"""A command-line parser whose errors are one sentence, with the nearest name for an unknown option."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, NoReturn, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from deeplens_lightning.cli.help import GROUPS, TOP_OPTIONS, option_names

_UNKNOWN = (
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"()does not accept option '([\w.]+)'",
    r"()Option '([\w.]+)' is not accepted",
    r"()unrecognized arguments: --([\w.]+)",
)
_EXPECTED = re.compile(r"Expected an? (?:<class ')?(.+?)(?:'>)?(?:\. Got value: .*)?$", re.MULTILINE)


class CommandParser(LightningArgumentParser):
    """Lightning's parser; an error is printed as one sentence, without the usage of all options.

    Attributes:
        options: names of the command's options and groups, for suggestions.
    """

    options: Sequence[str] = (*TOP_OPTIONS, *GROUPS, "optimizer", "lr_scheduler")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A shortened name would be taken for the option that begins with it, in place of an error.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None, **kwargs: Any
    ) -> Namespace:
        """Parse options; one for an entry of a dict keeps the other entries, and the name of an architecture."""
        # The parser of one class's arguments gets each option alone, and the arguments up to now as namespace.
        before = None if self.exit_on_error else self.get_defaults(skip_validation=True)
        if before is not None and namespace is not None:
            before.update(namespace)
        found: Namespace = super().parse_args(args, namespace, **kwargs)
        if before is not None:
            for word in args or ():
                _keep_entries(found, before, word.removeprefix("--").partition("=")[0])
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence on stderr and exit with 2."""
        if (
            not self.exit_on_error
        ):  # the parser of one class's arguments: the parser around it prints the error
            super().error(message, ex)
        self.exit(2, f"error: {sentence(message, self.options)}\n")


def _keep_entries(found: Namespace, before: Namespace, option: str) -> None:
    """Complete the dict that an option such as "shared.lr" sets one entry of."""
    path = option.split(".")
    for depth in range(1, len(path)):
        key = ".".join(path[:depth])
        if isinstance(given := found.get(key), dict):
            found[key] = _with_entries(before.get(key), given, path[depth - 1 :])


def _with_entries(before: Any, given: Any, path: Sequence[str]) -> Any:
    """Add to a dict, of which the entry at `path[1:]` was given, the entries that it had before.

    Args:
        before: the earlier value; an architecture may be a name.
        given: the new value.
        path: the dict's own name, and the names on the way to the entry.
    """
    name, *rest = path
    if isinstance(before, str) and name == "architecture":
        before = {"name": before}
    if not (rest and isinstance(before, dict) and isinstance(given, dict)):
        return given
    merged = {**before, **given}
    if rest[0] in given:
        merged[rest[0]] = _with_entries(before.get(rest[0]), given[rest[0]], rest)
    return merged


def with_values(words: Sequence[str], function: Callable[..., None]) -> list[str]:
    """Complete yes-or-no options that stand without a value: `--strict` becomes `--strict=true`.

    Args:
        words: options of the command line.
        function: the function whose arguments the options are.
    """
    flags = {f"--{name}" for name, kind in get_type_hints(function).items() if kind is bool}
    return [
        f"{word}=true" if word in flags and following.startswith("--") else word
        for word, following in pairwise([*words, "--"])
    ]


def sentence(message: str, options: Sequence[str]) -> str:
    """Say in one sentence what is wrong with the command line.

    Args:
        message: jsonargparse's error, which may span many lines.
        options: names of the command's options and groups.

    Returns:
        For an unknown option, the nearest known one; for a wrong value, what is expected; otherwise `message`.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    for pattern in _UNKNOWN:
        if match := re.search(pattern, message):
            name = ".".join(filter(None, [*keys, *match.groups()]))
            near = _nearest(name, keys, message, options)
            return f"there is no option {name!r}; " + (
                f"did you mean {near!r}?" if near else "--help lists the options"
            )
    values = re.findall(r"(?:Given|Got) value: (.+)", message)
    kinds = [_kind(text) for text in _EXPECTED.findall(message)]
    if keys and values and any(kinds):
        expected = " or ".join(dict.fromkeys(filter(None, kinds)))
        return f"{'.'.join(keys)}: got {values[0]}, expected {expected}"
    return message


def _nearest(name: str, keys: Sequence[str], message: str, options: Sequence[str]) -> str | None:
    """The known option whose name is nearest to an unknown one; None where none is near."""
    classes = re.findall(r"given class_path '([\w.]+)'", message)
    group, dot, option = name.partition(".")
    if classes:
        known = [".".join([*keys, key]) for key in option_names(resolve_name(classes[-1]))]
    elif dot and group in GROUPS:
        known = [f"{group}.{key}" for key in option_names(resolve_name(GROUPS[group].class_path))]
    else:
        near = get_close_matches(group, options, n=1, cutoff=0.5)
        return f"{near[0]}{dot}{option}" if near else None
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _kind(expected: str) -> str | None:
    """What jsonargparse expected, for a sentence; None for what a user would not type."""
    if expected == "NoneType" or expected.startswith("path but"):
        return None
    if expected.startswith("dot import path"):
        return "the import path of a class, such as package.module.Class"
    return expected.replace("typing.Literal", "one of ")
