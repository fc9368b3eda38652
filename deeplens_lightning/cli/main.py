"""The command line: Lightning's subcommands, and the commands of this package.

Experiments are YAML files, such as `deeplens-lightning fit --config configs/quickstart.yaml`. An error
that the user can correct is one sentence; `--traceback` before the command shows where it arose. docs/pages/running.md
lists the exit codes.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NoReturn

from deeplens_lightning.cli.help import (
    GROUPS,
    OWN_COMMANDS,
    TRAINER_COMMANDS,
    asked_group,
    contents,
    group_help,
    overview,
)
from deeplens_lightning.disk.mistakes import mistakes, sentence

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: command and options; default those of the process.

    Raises:
        SystemExit: with 1 or 2 and one sentence, for an error that the user can correct; with 130 after Ctrl-C and 143
            after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words[:1]
    words = words[1:] if show_traceback else words
    try:
        with _program_arguments(words):
            _run(words)
    except KeyboardInterrupt:
        if show_traceback:
            raise
        _stop(signal.SIGINT, "stopped by Ctrl-C")
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has shut down and exits with 1
            _stop(signal.SIGINT, "stopped by Ctrl-C")
        if isinstance(error, _imported_sigterm()):
            _stop(signal.SIGTERM, "stopped by SIGTERM")
        raise
    except mistakes() as error:
        if show_traceback:
            raise
        sys.exit(f"error: {_sentence(error)}")


def _stop(number: signal.Signals, text: str) -> NoReturn:
    """Print a line and exit as a shell reports a process that a signal ended: with 128 plus its number."""
    print(text, file=sys.stderr)
    sys.exit(128 + number)


def _imported_sigterm() -> type[SystemExit] | tuple[()]:
    """Lightning's exception for SIGTERM, if Lightning is imported."""
    if "lightning.pytorch" not in sys.modules:
        return ()
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return SIGTERMException


def _run(words: list[str]) -> None:
    command, *rest = words or ["--help"]
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(f"deeplens-lightning {version('deeplens-lightning')}")
    elif command not in (*TRAINER_COMMANDS, *OWN_COMMANDS):
        known = ", ".join((*TRAINER_COMMANDS, *OWN_COMMANDS))
        raise ValueError(f"there is no command {command!r}; the commands are {known}")
    elif name := asked_group(command, rest):
        kind = _class_of(name, rest)
        if kind is None or kind == GROUPS[name].class_path:
            print(group_help(command, name))
        else:
            _run([command, f"--{name}.help", kind])
    elif command in OWN_COMMANDS:
        _run_own(command, rest)
    elif "-h" in rest or "--help" in rest:
        print(contents(command))
    else:
        lightning_cli(words)


def lightning_cli(words: list[str] | None = None, run: bool = True) -> LightningCLI:
    """Lightning's command line for any LightningModule and data module, with layered YAML files.

    Args:
        words: subcommand and options; default those of the process.
        run: run the subcommand. False builds the Trainer, module and data module only; `words` then has no
            subcommand.

    Raises:
        ValueError: the model's `d_in` was given; it is taken from the data module.
    """
    import jsonargparse
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from deeplens_lightning.activation_data import callbacks_of
    from deeplens_lightning.callbacks.summary import FitSummary
    from deeplens_lightning.callbacks.throughput import Throughput
    from deeplens_lightning.cli.checkpoint_files import CheckpointFiles
    from deeplens_lightning.cli.newest_checkpoint import checkpoint_path
    from deeplens_lightning.cli.parser import CommandParser, trainer_option_types, with_values
    from deeplens_lightning.preemption import Preemption

    words = with_values(sys.argv[1:] if words is None else words, trainer_option_types())
    _refuse_d_in(words)

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            defaults = {name: GROUPS[name].class_path for name in ("model", "data")}
            parser.set_defaults(defaults)
            parser.link_arguments("data.d_in", "model.init_args.d_in", apply_on="instantiate")

        def _parse_ckpt_path(self) -> None:
            """Find the checkpoint of `--ckpt_path`. The settings in it stay unused; the SAE refuses one with others."""
            if run:
                command = self.config.subcommand
                settings = self.config[command]
                folders = ("trainer.logger.init_args.save_dir", "trainer.default_root_dir")
                runs = next(filter(None, map(settings.get, folders)), "lightning_logs")
                found = checkpoint_path(settings.ckpt_path, command, runs)
                if found != settings.ckpt_path:
                    settings.ckpt_path = found
                    sys.argv.append(
                        f"--ckpt_path={found or 'null'}"
                    )  # DDP starts the other ranks with these words

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """Refuse damaged checkpoints; name the file where one cannot be saved."""
            trainer = super().instantiate_trainer(**kwargs)
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = CheckpointFiles(trainer.checkpoint_callbacks)
            return trainer

        def before_fit(self) -> None:
            """Save at the end of a batch after SIGTERM."""
            checkpoints = self.trainer.checkpoint_callbacks
            present = any(isinstance(callback, Preemption) for callback in checkpoints)
            if checkpoints and not present:
                callbacks_of(self.trainer).append(Preemption())

    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    with _program_arguments(words):
        return Command(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [FitSummary(), Throughput()]},
            parser_kwargs={"parser_mode": "omegaconf+"},
            parser_class=CommandParser,
            run=run,
        )


@contextmanager
def _program_arguments(words: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv`: Lightning's parser reads it, and DDP starts its other processes with it."""
    before, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def _refuse_d_in(words: Sequence[str]) -> None:
    """Refuse a `d_in` for the model: the parser would replace it by the data's without a warning."""
    from omegaconf import OmegaConf

    given = [word for word in words if re.match(r"--model(\.init_args)?\.d_in\b", word)]
    for path, settings in _configs(words):
        keys = ("model.init_args.d_in", "model.d_in")
        given.extend(f"{key} in {path}" for key in keys if OmegaConf.select(settings, key) is not None)
    if given:
        raise ValueError(f"{given[0]}: d_in is taken from the data; remove it from the model's settings")


def _class_of(group: str, words: Sequence[str]) -> str | None:
    """The class that the words or their configs choose for `model` or `data`; None for the default class."""
    from omegaconf import OmegaConf

    chosen = [OmegaConf.select(settings, f"{group}.class_path") for _, settings in _configs(words)]
    chosen += _values(words, f"--{group}", f"--{group}.class_path")
    return next(filter(None, reversed(chosen)), None)


def _configs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The path and the content of every config in the words."""
    from omegaconf import OmegaConf

    for path in _values(words, "--config", "-c"):
        if Path(path).is_file():
            yield path, OmegaConf.load(path)


def _values(words: Sequence[str], *options: str) -> list[str]:
    """The values of some options, in the order of the words."""
    parts = [(*word.partition("="), following) for word, following in pairwise([*words, ""])]
    values = [
        value if equals else following for option, equals, value, following in parts if option in options
    ]
    return list(filter(None, values))


def _run_own(command: str, words: list[str]) -> None:
    """Parse and run one of `OWN_COMMANDS`; the imports are slow, so that they wait until here."""
    from deeplens_lightning.cli.commands import FUNCTIONS
    from deeplens_lightning.cli.parser import CommandParser, option_types, with_lists, with_values

    parser = CommandParser(
        prog=f"deeplens-lightning {command}", description=OWN_COMMANDS[command], parser_mode="omegaconf+"
    )
    function = resolve_name(FUNCTIONS[command])
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    positional = command in ("inspect", "latents", "report", "verify")
    parser.options = parser.add_function_arguments(function, as_positional=positional)
    if "data" in parser.options:
        parser.set_defaults({"data": GROUPS["data"].class_path})
    types = option_types(function)
    given = parser.instantiate(parser.parse_args(with_lists(with_values(words, types), types)))
    given.pop("config", None)
    function(**given.as_dict())


def _sentence(error: Exception) -> str:
    text = sentence(error)
    inner = re.search(r"Errors:\n\s*- (.+)", text)  # the constructor's own error, wrapped by jsonargparse
    return inner.group(1) if inner else text
