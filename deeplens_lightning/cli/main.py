"""The command line: Lightning's own subcommands, and four of ours.

Experiments are YAML; `fit --config configs/quickstart.yaml` is the first to try. What a user got wrong is said
in one sentence; `--traceback` in front shows where it was found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

OWN_COMMANDS = {
    "inspect": "hook points of a model, their d_in, and what a choice of them loads",
    "bench": "how close this machine's stream is to the bare model",
    "extract": "write activations to shards",
    "verify": "read every byte of a cache and say what is wrong with it",
    "report": "one HTML page about a finished run",
}
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with 1 and one sentence if the user has to change something."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words[:1]
    words = words[1:] if show_traceback else words
    argv, sys.argv = sys.argv, [sys.argv[0], *words]  # where Lightning's command line reads from
    try:
        _run(words)
    except _mistakes() as error:
        if show_traceback:
            raise
        sys.exit(f"error: {_sentence(error)}")
    finally:
        sys.argv = argv


def _run(words: list[str]) -> None:
    command = words[0] if words else "--help"
    if command in OWN_COMMANDS:
        _own(command, words[1:])
    elif command in ("-h", "--help"):
        own = "\n".join(f"  {name:10}{text}" for name, text in OWN_COMMANDS.items())
        print(
            "usage: deeplens-lightning [--traceback] COMMAND [--help]\n\n"
            "  fit       train; also validate, test, predict: see Lightning's documentation of its CLI\n"
            + own
        )
    elif command not in TRAINER_COMMANDS:
        raise ValueError(
            f"there is no command {command!r}; there are {', '.join((*TRAINER_COMMANDS, *OWN_COMMANDS))}"
        )
    else:
        lightning_cli()


def lightning_cli(words: list[str] | None = None, run: bool = True) -> LightningCLI:
    """Lightning's command line over our classes: any LightningModule, any data module, layered YAML.

    Args:
        words: default those of the process.
        run: run the subcommand, or only build what it would run with.

    Raises:
        ValueError: a `d_in` was given that is not the data's.
    """
    import jsonargparse
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from deeplens_lightning.callbacks.summary import FitSummary
    from deeplens_lightning.callbacks.throughput import Throughput
    from deeplens_lightning.cli.newest_checkpoint import with_newest

    if any("newest:" in word for word in (sys.argv[1:] if words is None else words)):
        words = with_newest(sys.argv[1:] if words is None else words)

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            _refuse_d_in(sys.argv[1:] if words is None else words)
            parser.set_defaults(
                {
                    "model": "deeplens_lightning.SparseAutoencoder",
                    "data": "deeplens_lightning.ActivationDataModule",
                }
            )
            parser.link_arguments("data.d_in", "model.init_args.d_in", apply_on="instantiate")

        def _parse_ckpt_path(self) -> None:
            """Take no settings out of `--ckpt_path`: an SAE refuses a checkpoint of other settings by itself."""

    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return Command(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [FitSummary(), Throughput()]},
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=words,
        run=run,
    )


def _refuse_d_in(words: Sequence[str]) -> None:
    """The data say what d_in is; what a user gives beside them would be ignored silently by a linked argument."""
    from omegaconf import OmegaConf

    given = [word for word in words if re.match(r"--model(\.init_args)?\.d_in\b", word)]
    for flag, value in pairwise([*words, ""]):
        path = (
            value
            if flag in ("--config", "-c")
            else flag.removeprefix("--config=")
            if "--config=" in flag
            else ""
        )
        if path and Path(path).is_file():
            settings = OmegaConf.load(path)
            keys = ("model.init_args.d_in", "model.d_in")
            given.extend(f"{key} in {path}" for key in keys if OmegaConf.select(settings, key) is not None)
    if given:
        raise ValueError(f"{given[0]}: d_in is taken from the data, so leave it out of the model's settings")


def _own(command: str, words: list[str]) -> None:
    """Parse and run one of `OWN_COMMANDS`; their modules are imported when they are needed."""
    from jsonargparse import ArgumentParser

    from deeplens_lightning.cli import commands

    run = getattr(commands, command)
    parser = ArgumentParser(
        prog=f"deeplens-lightning {command}", description=OWN_COMMANDS[command], parser_mode="omegaconf+"
    )
    parser.add_argument("--config", action="config", help="YAML with any of these")
    parser.add_function_arguments(run, as_positional=command in ("inspect", "report", "verify"))
    if command in ("bench", "extract"):
        parser.set_defaults({"data": "deeplens_lightning.ActivationDataModule"})
    settings = parser.parse_args(words)
    given = parser.instantiate_classes(settings)
    given.pop("config", None)
    run(**given.as_dict())


def _mistakes() -> tuple[type[Exception], ...]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from deeplens_lightning.shards.errors import DiskFullError

    missing = (FileNotFoundError, FileExistsError, ModuleNotFoundError)
    return (ValueError, *missing, DiskFullError, MisconfigurationException)


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    inner = re.search(r"Errors:\n\s*- (.+)", text)  # what a constructor said, in jsonargparse's wrapping
    return inner.group(1) if inner else text
