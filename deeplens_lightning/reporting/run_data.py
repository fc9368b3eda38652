"""What a run's folder holds, gathered from its files alone: no model, no data module, no Trainer.

In: the folder that callbacks wrote into. Out: one JSON-able dictionary, small enough for a page.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deeplens_lightning.reporting.readable_tokens import visible
from deeplens_lightning.reporting.run_folder import read_jsonl

Curve = list[tuple[int, float]]

_EVENTS = "events.out.tfevents.*"
_MAX_POINTS = 800
_MAX_LOOKS = 60
_OURS = (
    "curves.jsonl",
    "summary.json",
    "metrics.csv",
    "top_tokens/latents.json",
    "latent_statistics/latest.json",
)


def find_run(folder: Path) -> Path:
    """The run's folder: this one, or the newest run below it.

    Raises:
        FileNotFoundError: there is none; the message says what a run's folder holds.
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
            f"{folder} holds nothing to report: no {', '.join(_OURS)} or single samples, here or below; fit "
            "with the FitSummary callback or a CSVLogger"
        )
    return max(runs, key=lambda path: (path.stat().st_mtime, str(path)))


def read_run(folder: Path) -> dict[str, Any]:
    """Everything a report shows.

    Args:
        folder: from `find_run`.

    Returns:
        `name`, `summary` (or None), `curves` by name, `firing` (counts and rows of `heldout` and
        `training`, or None), `latents` (or None), and `samples`, one entry per folder and text.
    """
    return {
        "name": visible(str(folder)),
        "summary": _json(folder / "summary.json"),
        "curves": _curves(folder),
        "firing": _firing(_json(folder / "latent_statistics" / "latest.json")),
        "latents": _latents(_json(folder / "top_tokens" / "latents.json")),
        "samples": [
            entry
            for path in sorted(folder.glob("*/samples.jsonl"))
            for entry in _samples(path.parent.name, path)
        ],
    }


def _is_run(folder: Path) -> bool:
    patterns = ("*/samples.jsonl", _EVENTS)
    return any((folder / name).is_file() for name in _OURS) or any(any(folder.glob(p)) for p in patterns)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _curves(folder: Path) -> dict[str, Curve]:
    """Scalars by name, each from the first source that has it."""
    sources = (_from_jsonl(folder / "curves.jsonl"), _from_csv(folder / "metrics.csv"), _from_events(folder))
    curves: dict[str, Curve] = {}
    for points in sources:
        found: dict[str, dict[int, float]] = {}
        for name, step, value in points:
            if math.isfinite(value):
                found.setdefault(name, {})[step] = value  # a step that came again after a resume counts last
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
        return  # the run was logged elsewhere, or tensorboard was removed: what files there are is shown
    events = EventAccumulator(str(folder)).Reload()
    for name in events.Tags()["scalars"]:
        if name not in ("epoch", "hp_metric"):
            yield from ((name, event.step, event.value) for event in events.Scalars(name))


def _thinned(points: Curve) -> Curve:
    """At most so many points, evenly spread, the last among them."""
    every = -(-len(points) // _MAX_POINTS)
    return points[::-1][::every][::-1] if every > 1 else points


def _firing(latest: Any) -> Any:
    """Histogram bins instead of one number per latent."""
    if latest is None:
        return None
    return {"step": latest["step"]} | {
        name: _binned(latest[name]["counts"], latest[name]["rows"])
        for name in ("heldout", "training")
        if name in latest
    }


def _binned(counts: Sequence[int], rows: int, width: float = 0.1) -> dict[str, Any]:
    """Latents by log10 of the fraction of rows on which they fire, in bins of a tenth."""
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


def _latents(found: Any) -> Any:
    if found is None:
        return None
    for entry in found["latents"]:
        for context in entry["contexts"]:
            context["tokens"] = [visible(token) for token in context["tokens"]]
    return found


def _samples(folder: str, path: Path) -> Iterator[dict[str, Any]]:
    """One entry per text: its tokens once, and the numbers of some looks, the first and last among them."""
    texts: dict[int, dict[int, dict[int, dict[str, Any]]]] = {}
    for line in read_jsonl(path):
        texts.setdefault(line["sample"], {}).setdefault(line["step"], {})[line["position"]] = line
    for number, looks in sorted(texts.items()):
        steps = _spread(sorted(looks), _MAX_LOOKS)
        first = looks[steps[0]]
        yield {
            "name": f"{visible(folder)} {number}",
            "tokens": [visible(first[i]["token"]) for i in sorted(first)],
            "looks": [{"step": step} | _look(looks[step]) for step in steps],
        }


def _look(tokens: dict[int, dict[str, Any]]) -> dict[str, Any]:
    rows = [tokens[i] for i in sorted(tokens)]
    names = ("norm", "relative_error", "l0", "latents", "values")
    return {name: [row.get(name) for row in rows] for name in names if any(name in row for row in rows)}


def _spread(items: Sequence[int], limit: int) -> list[int]:
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def names_of(curves: Iterable[str]) -> list[str]:
    """Curve names without those of single samples, which have a section of their own."""
    return [name for name in curves if not name.startswith("single_sample/")]
