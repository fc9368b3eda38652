"""Help texts of the command line: the list of commands, and the options of the Trainer commands by group.

The overviews are plain text, so that they print at once. The options of a group are read from its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getdoc
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

TRAINER_COMMANDS = {
    "fit": "train an SAE, or any LightningModule, on a model's activations",
    "validate": "one pass over the validation rows: held-out documents",
    "test": "one pass over the test documents; without any, over the rows of validate",
    "predict": "active latents of the rows of validate; LatentPredictionWriter writes them",
}
OWN_COMMANDS = {
    "inspect": "list the hook points of a model and their d_in; no weights are loaded",
    "bench": "measure the speed of the stream against the bare model",
    "extract": "write a model's activations to shards",
    "verify": "compare every shard of a cache with its checksum",
    "report": "write one HTML page about a finished run",
    "latents": "print the text on which chosen latents of a finished run are most active",
    "doctor": "check this machine and its devices: about a minute of self-checks",
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of options, such as `--trainer.*`.

    Attributes:
        class_path: the class whose arguments the options are; for `model` and `data` the default class.
        line: what the group sets; empty where the first line of the class's docstring is shown.
    """

    class_path: str
    line: str = ""


GROUPS = {
    "trainer": Group(
        class_path="lightning.pytorch.Trainer",
        line="Lightning's Trainer: devices, precision, epochs, loggers, callbacks",
    ),
    "model": Group(
        class_path="deeplens_lightning.SparseAutoencoder",
        line="what is trained: SparseAutoencoder, or --model CLASS",
    ),
    "data": Group(
        class_path="deeplens_lightning.ActivationDataModule",
        line="model, hook points, text or shards, batches; or --data CLASS",
    ),
    "data.text_options": Group(class_path="deeplens_lightning.options.TextOptions"),
    "data.model_options": Group(class_path="deeplens_lightning.options.ModelOptions"),
    "data.buffer_options": Group(class_path="deeplens_lightning.options.BufferOptions"),
    "data.cache_options": Group(class_path="deeplens_lightning.options.CacheOptions"),
}
TOP_OPTIONS = {
    "config": "FILE: YAML with any options; a later file or option overrides an earlier one",
    "print_config": "print all settings as YAML and stop",
    "ckpt_path": "FILE to continue from, or newest:FOLDER for the newest intact one below a folder",
    "weights_only": "true or false: accept only tensors and plain values in a checkpoint",
    "seed_everything": "N: seed of the weights' initialisation",
}


def overview() -> str:
    """The text of `deeplens-lightning --help`: every command with one line."""
    return "\n".join(
        [
            "usage: deeplens-lightning [--traceback] COMMAND [OPTIONS]",
            "",
            "Train and evaluate (Lightning's Trainer)",
            *_table(TRAINER_COMMANDS),
            "",
            "Models, caches and reports",
            *_table(OWN_COMMANDS),
            "",
            "deeplens-lightning COMMAND --help shows the options of a command; --version prints the version.",
            "deeplens-lightning --traceback COMMAND shows where an error arose.",
            "Exit codes: 0 done; 1 or 2 an error; 130 stopped by Ctrl-C; 143 stopped by SIGTERM, after saving.",
        ]
    )


def contents(command: str) -> str:
    """The text of `deeplens-lightning fit --help`: the groups of options, and how to list each group."""
    groups = {f"--{name}.*": group.line or _first_line(group.class_path) for name, group in GROUPS.items()}
    groups["--optimizer.*"] = "for a module without configure_optimizers; also --lr_scheduler.*"
    load = "FILE to load, or newest:FOLDER for the newest intact one below a folder"
    options = TOP_OPTIONS if command == "fit" else {**TOP_OPTIONS, "ckpt_path": load}
    run = f"deeplens-lightning {command}"
    return "\n".join(
        [
            f"usage: {run} [--config FILE ...] [--GROUP.OPTION VALUE ...]",
            f"  for example: {run} --config configs/quickstart.yaml --data.layer 2",
            "",
            "Commands with these options",
            *_table(TRAINER_COMMANDS),
            "",
            "Options",
            *_table({f"--{name}": line for name, line in options.items()}),
            "",
            "Groups of options",
            *_table(groups),
            "",
            "List the options of a group",
            f"  {run} --trainer.help",
            f"  {run} --data.text_options.help",
            "List the options of another class",
            f"  {run} --data.help deeplens_lightning.ActivationDataModule",
            f"  {run} --model.help deeplens_lightning.SparseAutoencoderGrid",
            f"  {run} --trainer.callbacks.help deeplens_lightning.callbacks.LossRecovered",
        ]
    )


def asked_group(command: str, words: Sequence[str]) -> str | None:
    """The group whose options a word lists, without the name of a class: `data` for `--data.help`; None for none."""
    groups = GROUPS if command in TRAINER_COMMANDS else [name for name in GROUPS if name.startswith("data")]
    asked = [word for word, following in pairwise([*words, "--"]) if following.startswith("--")]
    return next((name for name in groups if f"--{name}.help" in asked), None)


def group_help(command: str, name: str) -> str:
    """The text of `--NAME.help`: every option of a group with its type, default and meaning."""
    from jsonargparse import ArgumentParser

    run = f"deeplens-lightning {command}"
    parser = ArgumentParser(prog=run, usage=f"{run} [--{name}.OPTION VALUE ...]", add_help=False)
    parser.add_class_arguments(resolve_name(GROUPS[name].class_path), name)
    return parser.format_help()


def option_names(kind: type[Any]) -> list[str]:
    """The names of a class's arguments; of an argument that is a dataclass, dotted names of its fields."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    return list(parser.get_defaults().keys())


def _table(lines: dict[str, str]) -> list[str]:
    width = max(10, *(len(name) + 2 for name in lines))
    return [f"  {name:{width}}{line}" for name, line in lines.items()]


def _first_line(class_path: str) -> str:
    line = (getdoc(resolve_name(class_path)) or "").partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]
