"""Read what a run's folder holds, from its files alone: no model, data module or Trainer.

In: the folder that callbacks and loggers wrote to. Out: a `RunData`, small enough for a web page.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplens_lightning.reporting.readable_tokens import visible
from deeplens_lightning.reporting.run_folder import read_jsonl

Curve = list[tuple[int, float]]
"""Points `(step, value)` of one scalar, by step."""

_EVENTS = "events.out.tfevents.*"
_MAX_POINTS = 800  # of a curve
_MAX_STEPS = 60  # at which a single sample is shown
_RUN_FILES = (
    "curves.jsonl",
    "summary.json",
    "metrics.csv",
    "top_tokens/latents.json",
    "latent_statistics/latest.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a report shows of a run; every field can be written as JSON.

    Attributes:
        name: the run's folder.
        summary: content of `summary.json`; None where there is none.
        curves: logged scalars by name.
        firing: `step`, and histograms of firing frequencies on `heldout` and `training` rows; None where not measured.
        latents: content of `top_tokens/latents.json`; None where there is none.
        samples: single samples, one entry for each folder and text.
    """

    name: str
    summary: dict[str, Any] | None
    curves: dict[str, Curve]
    firing: dict[str, Any] | None
    latents: dict[str, Any] | None
    samples: list[dict[str, Any]]


def find_run(folder: Path) -> Path:
    """Find a run's folder: `folder` itself if it is one, else the newest run inside it.

    Raises:
        FileNotFoundError: `folder` does not exist or holds no run; the message lists the files of a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give the run's folder, e.g. lightning_logs/version_0"
        )
    if _is_run(folder):
        return folder
    runs = [path for path in folder.rglob("*") if path.is_dir() and _is_run(path)]
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds nothing to report: neither it nor a folder inside it has {', '.join(_RUN_FILES)} or "
            "single samples; fit with the FitSummary callback or a CSVLogger"
        )
    return max(runs, key=lambda path: (path.stat().st_mtime, str(path)))


def read_run(folder: Path) -> RunData:
    """Read the files of a run.

    Args:
        folder: the run's folder, from `find_run`.
    """
    return RunData(
        name=visible(str(folder)),
        summary=_json(folder / "summary.json"),
        curves=_curves(folder),
        firing=_firing(_json(folder / "latent_statistics" / "latest.json")),
        latents=_latents(_json(folder / "top_tokens" / "latents.json")),
        samples=[
            entry
            for path in sorted(folder.glob("*/samples.jsonl"))
            for entry in _samples(path.parent.name, path)
        ],
    )


def _is_run(folder: Path) -> bool:
    patterns = ("*/samples.jsonl", _EVENTS)
    return any((folder / name).is_file() for name in _RUN_FILES) or any(any(folder.glob(p)) for p in patterns)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _curves(folder: Path) -> dict[str, Curve]:
    """Scalars by name: from `curves.jsonl`, else `metrics.csv`, else TensorBoard's files."""
    sources = (_from_jsonl(folder / "curves.jsonl"), _from_csv(folder / "metrics.csv"), _from_events(folder))
    curves: dict[str, Curve] = {}
    for points in sources:
        found: dict[str, dict[int, float]] = {}
        for name, step, value in points:
            if math.isfinite(value):
                found.setdefault(name, {})[step] = value  # of a step logged again after a resume, the last
        for name, values in found.items():
            curves.setdefault(name, _thinned(sorted(values.items())))
    return curves


def _from_jsonl(path: Path) -> Iterator[tuple[str, int, float]]:
    for line in read_jsonl(path) if path.is_file() else ():
        step = line.pop("step")
        yield from ((name, step, value) for name, value in line.items() if value is not None)


def _from_csv(path: Path) -> Iterator[tuple[str, int, float]]:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", "") or ""
            for name, value in row.items():
                if step and value and name != "epoch":
                    yield name, int(float(step)), float(value)


def _from_events(folder: Path) -> Iterator[tuple[str, int, float]]:
    if not any(folder.glob(_EVENTS)):
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError:
        return  # the run was logged on another machine, or tensorboard was removed: show the other files
    events = EventAccumulator(str(folder)).Reload()
    for name in events.Tags()["scalars"]:
        if name not in ("epoch", "hp_metric"):
            yield from ((name, event.step, event.value) for event in events.Scalars(name))


def _thinned(points: Curve) -> Curve:
    """At most `_MAX_POINTS` points at even distances, the last one among them."""
    every = -(-len(points) // _MAX_POINTS)
    return points[::-1][::every][::-1] if every > 1 else points


def _firing(latest: dict[str, Any] | None) -> dict[str, Any] | None:
    """Histograms in place of one count for each latent."""
    if latest is None:
        return None
    return {"step": latest["step"]} | {
        name: _binned(latest[name]["counts"], latest[name]["rows"])
        for name in ("heldout", "training")
        if name in latest
    }


def _binned(counts: Sequence[int], rows: int, width: float = 0.1) -> dict[str, Any]:
    """A histogram of latents over log10 of the fraction of rows on which they fire.

    Args:
        counts: number of rows on which each latent fired.
        rows: number of rows counted.
        width: width of a bin.
    """
    bins: dict[int, int] = {}
    for count in counts:
        if count > 0:
            key = math.floor(math.log10(count / rows) / width)
            bins[key] = bins.get(key, 0) + 1
    return {
        "rows": rows,
        "latents": len(counts),
        "dead": sum(count == 0 for count in counts),
        "dense": sum(count > 0.1 * rows for count in counts),
        "width": width,
        "bins": sorted((key * width, n) for key, n in bins.items()),
    }


def _latents(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Top contexts of latents with tokens that can be shown."""
    if found is None:
        return None
    for entry in found["latents"]:
        for context in entry["contexts"]:
            context["tokens"] = [visible(token) for token in context["tokens"]]
    return found


def _samples(folder: str, path: Path) -> Iterator[dict[str, Any]]:
    """One entry for each text of a `samples.jsonl`: its tokens, and its numbers at up to `_MAX_STEPS` steps."""
    texts: dict[int, dict[int, dict[int, dict[str, Any]]]] = {}
    for line in read_jsonl(path):
        texts.setdefault(line["sample"], {}).setdefault(line["step"], {})[line["position"]] = line
    for number, by_step in sorted(texts.items()):
        steps = _spread(sorted(by_step), _MAX_STEPS)
        first = by_step[steps[0]]
        yield {
            "name": f"{visible(folder)} {number}",
            "tokens": [visible(first[i]["token"]) for i in sorted(first)],
            "looks": [{"step": step} | _columns(by_step[step]) for step in steps],
        }


def _columns(tokens: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The lines of one text at one step, by token position, as one list for each quantity that they have."""
    rows = [tokens[i] for i in sorted(tokens)]
    names = ("norm", "relative_error", "l0", "latents", "values")
    return {name: [row.get(name) for row in rows] for name in names if any(name in row for row in rows)}


def _spread(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` items at even distances, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def names_of(curves: Iterable[str]) -> list[str]:
    """Names of curves without those of single samples, which have a section of their own."""
    return [name for name in curves if not name.startswith("single_sample/")]
