"""A command-line parser whose errors are one sentence, with the nearest name for an unknown option."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
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


def option_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments by name; of an argument that is a group of options, by dotted names."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(function).items():
        if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, LightningDataModule)):
            types |= {f"{name}.{key}": own for key, own in option_types(kind.__init__).items()}
        else:
            types[name] = kind
    return types


def trainer_option_types() -> dict[str, Any]:
    """The types of the options of Lightning's commands, for the default classes of the groups."""
    types: dict[str, Any] = {"seed_everything": bool | int, "weights_only": bool | None}
    for group in ("trainer", "model", "data"):
        own = option_types(resolve_name(GROUPS[group].class_path).__init__)
        types |= {f"{group}.{name}": kind for name, kind in own.items()}
    return types


def with_values(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Complete yes-or-no options that stand without a value: `--plan` becomes `--plan=true`.

    Args:
        words: options of the command line.
        types: the types of the options by name.

    Raises:
        ValueError: an option of another type stands without a value.
    """
    return [_with_value(word, following, types) for word, following in pairwise([*words, "--"])]


def _with_value(word: str, following: str, types: Mapping[str, Any]) -> str:
    kind = types.get(word.removeprefix("--")) if word.startswith("--") else None
    last = following.startswith("--")
    if kind is bool and (last or following.lower() not in ("true", "false", "yes", "no")):
        return f"{word}=true"
    if kind is None or not last:
        return word
    if bool not in get_args(kind):
        raise ValueError(f"{word} needs a value: {word}=VALUE")
    return f"{word}=true"


def with_lists(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Join the values of options that are lists of numbers: `--ids 5 17` becomes `--ids=[5,17]`.

    Args:
        words: options of the command line.
        types: the types of the options, from `option_types`.
    """
    lists = {f"--{name}" for name, kind in types.items() if kind == list[int] | None}
    found: list[str] = []
    for word in words:
        name, _, values = found[-1].partition("=") if found else ("", "", "")
        if name in lists and word.isdecimal() and (not values or values.endswith("]")):
            found[-1] = f"{name}={values[:-1]},{word}]" if values else f"{name}=[{word}]"
        else:
            found.append(word)
    return found


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
            group = name.partition(".")[0]
            listing = f"--{group}.help" if group in GROUPS and "." in name else "--help"
            hint = f"did you mean {near!r}?" if near else f"{listing} lists the options"
            return f"there is no option {name!r}; {hint}"
    if match := re.search(r"argument (--[\w.]+\.help): expected one argument", message):
        return f"{match[1]} needs the name of a class: {match[1]}=CLASS"
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
    in_groups = _in_groups(options)
    elsewhere = in_groups.get(option or group)
    if elsewhere not in (None, name):  # its group is missing, or is another one
        return elsewhere
    if not classes and group not in GROUPS:
        known = {key: key for key in options} if dot else in_groups | {key: key for key in options}
        near = get_close_matches(group, known, n=1, cutoff=0.6)
        return f"{known[near[0]]}{dot}{option}" if near else None
    prefix = ".".join(keys) if classes else group
    names = option_names(resolve_name(classes[-1] if classes else GROUPS[group].class_path))
    near = get_close_matches(name.removeprefix(f"{prefix}."), names, n=1, cutoff=0.6)
    return f"{prefix}.{near[0]}" if near else None


def _in_groups(options: Sequence[str]) -> dict[str, str]:
    """The options of the groups of a command, by the last part of their names: `layer` is `data.layer`."""
    names = [
        f"{group}.{name}"
        for group in ("trainer", "model", "data")
        if group in options
        for name in option_names(resolve_name(GROUPS[group].class_path))
    ]
    return {name.rpartition(".")[2]: name for name in sorted(names, key=lambda name: -name.count("."))}


def _kind(expected: str) -> str | None:
    """What jsonargparse expected, for a sentence; None for what a user would not type."""
    if expected == "NoneType" or expected.startswith("path but"):
        return None
    if expected.startswith("dot import path"):
        return "the import path of a class, such as package.module.Class"
    return expected.replace("typing.Literal", "one of ")
