"""Read what a run's folder holds, from its files alone: no model, data module or Trainer.

In: the folder that callbacks and loggers wrote to. Out: a `RunData`, small enough for a web page.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplens_lightning.reporting.readable_tokens import visible
from deeplens_lightning.reporting.run_folder import parts_of, read_jsonl

Curve = list[tuple[int, float]]
"""Points `(step, value)` of one scalar, by step."""
Parts = list[tuple[Path, float]]
"""The folders of a run, each with the last step of it that counts."""

_EVENTS = "events.out.tfevents.*"
_MAX_POINTS = 800  # of a curve
_MAX_STEPS = 60  # at which a single sample is shown
_RUN_FILES = (
    "curves.jsonl",
    "summary.json",
    "metrics.csv",
)
_RUN_PATTERNS = (
    "*/samples.jsonl",
    "*/latents.json",
    "latent_statistics*/latest.json",
    "chosen_latents*/*.json",
    _EVENTS,
)
_STAGES = ("train", "val", "test")
_CONSTANT = 1e-3  # spread of a curve, as a share of its largest value, up to which it is not drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a report shows of a run; every field can be written as JSON.

    Attributes:
        name: the run's folder.
        earlier: the folders from which the run was resumed, the first one first.
        summary: content of `summary.json`; None where there is none.
        curves: logged scalars by name, of all folders.
        firing: for each SAE `sae`, `step`, and histograms of firing frequencies on `heldout` and `training` rows.
        latents: `latent, frequency, contexts` of each latent, with the `sae, reads, rows, step` of its file.
        samples: single samples, one entry for each folder and text.
    """

    name: str
    earlier: list[str]
    summary: dict[str, Any] | None
    curves: dict[str, Curve]
    firing: list[dict[str, Any]]
    latents: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def find_run(folder: Path, prefer: Callable[[Path], bool] = lambda _: True) -> Path:
    """Find a run's folder: `folder` itself if it is one, else the newest run inside it.

    Args:
        folder: the folder of a run, or of several.
        prefer: of several runs, the newest with this property is taken if there is one.

    Raises:
        FileNotFoundError: `folder` does not exist or holds no run; the message lists the files of a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give the run's folder, e.g. lightning_logs/version_0"
        )
    if _is_run(folder):
        return folder
    found = {path for path in folder.rglob("*") if path.is_dir() and _is_run(path)}
    runs = [path for path in found if found.isdisjoint(path.parents)]  # not the folders of a run
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds nothing to report: neither it nor a folder inside it has {', '.join(_RUN_FILES)} or "
            "single samples; fit with the FitSummary callback or a CSVLogger"
        )
    return max(runs, key=lambda path: (prefer(path), path.stat().st_mtime, str(path)))


def read_run(folder: Path) -> RunData:
    """Read the files of a run, and those of the folders from which it was resumed.

    Args:
        folder: the run's folder, from `find_run`.
    """
    parts = parts_of(folder)
    return RunData(
        name=visible(str(folder)),
        earlier=[visible(str(part)) for part, _ in parts[:-1]],
        summary=_json(folder / "summary.json"),
        curves=_curves(parts),
        firing=_newest(parts, _firing),
        latents=_newest(parts, _latents),
        samples=list(_samples(parts)),
    )


def _newest(parts: Parts, read: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the last of the folders that has it holds."""
    return next(filter(None, (read(part) for part, _ in reversed(parts))), [])


def _is_run(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _RUN_FILES):
        return True
    return any(any(folder.glob(pattern)) for pattern in _RUN_PATTERNS)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _curves(parts: Parts) -> dict[str, Curve]:
    """Scalars by name, of all folders: those that a resumed run logged again replace the earlier ones."""
    curves: dict[str, dict[int, float]] = {}
    for folder, last in parts:
        for name, points in _curves_in(folder).items():
            kept = {step: value for step, value in points.items() if step <= last}
            curves[name] = curves.get(name, {}) | kept
    return {name: _thinned(sorted(points.items())) for name, points in curves.items() if points}


def _curves_in(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by name: from `curves.jsonl`, else `metrics.csv`, else TensorBoard's files."""
    sources = (_from_jsonl(folder / "curves.jsonl"), _from_csv(folder / "metrics.csv"), _from_events(folder))
    curves: dict[str, dict[int, float]] = {}
    for points in sources:
        found: dict[str, dict[int, float]] = {}
        for name, step, value in points:
            if math.isfinite(value):
                found.setdefault(name, {})[step] = value  # of a step logged again after a resume, the last
        curves = found | curves
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


def _firing(folder: Path) -> list[dict[str, Any]]:
    """Histograms in place of one count for each latent, for each SAE."""
    found = []
    for path in sorted(folder.glob("latent_statistics*/latest.json")):
        latest = json.loads(path.read_text(encoding="utf-8"))
        binned = {
            name: _binned(latest[name]["counts"], latest[name]["rows"])
            for name in ("heldout", "training")
            if name in latest
        }
        found.append({"sae": visible(latest.get("sae", "")), "step": latest["step"]} | binned)
    return found


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


def _latents(folder: Path) -> list[dict[str, Any]]:
    """Contexts of latents: chosen ones first, those of single samples last; each latent of an SAE once."""
    patterns = ("chosen_latents*/*.json", "top_tokens*/latents.json", "*/latents.json")
    paths = dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern)))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        of_file = {
            "sae": visible(content.get("sae", "")),
            "reads": [visible(hook) for hook in content["reads"]],
            "rows": content["rows"],
            "step": content["step"],
        }
        for entry in content["latents"]:
            for context in entry["contexts"]:
                context["tokens"] = [visible(token) for token in context["tokens"]]
            found.setdefault((of_file["sae"], entry["latent"]), entry | of_file)
    return list(found.values())


def _samples(parts: Parts) -> Iterator[dict[str, Any]]:
    """One entry for each folder of single samples and each of its texts."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for folder, last in parts:
        for path in sorted(folder.glob("*/samples.jsonl")):
            kept = [line for line in read_jsonl(path) if line["step"] <= last]
            lines.setdefault(path.parent.name, []).extend(kept)
    for name in sorted(lines):
        yield from _texts(name, lines[name])


def _texts(folder: str, lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One entry for each text: its tokens, and its numbers at up to `_MAX_STEPS` steps."""
    texts: dict[int, dict[int, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        texts.setdefault(line["sample"], {}).setdefault(line["step"], {})[line["position"]] = line
    for number, by_step in sorted(texts.items()):
        steps = _spread(sorted(by_step), _MAX_STEPS)
        first = by_step[steps[0]]
        yield {
            "name": f"{visible(folder)} {number}",
            "sae": visible(first[min(first)].get("sae", "")),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve of a chart.

    Attributes:
        name: the name under which it was logged.
        stage: `train`, `val` or `test`; empty for other metrics.
        sae: name of the SAE in a grid; empty for a single one.
    """

    name: str
    stage: str
    sae: str


def charts(curves: Mapping[str, Curve]) -> dict[str, list[Series]]:
    """The curves by quantity: train/fvu, val/fvu and val/fvu/<sae> of each SAE of a grid share one chart.

    Those of single samples are left out; they have a section of their own.
    """
    saes = {match[1] for name in curves if (match := re.fullmatch("(?:train|val)/fvu/(.+)", name))}
    found: dict[str, list[Series]] = {}
    for name in curves:
        if name.startswith("single_sample/"):
            continue
        sae = max((sae for sae in saes if name.endswith(f"/{sae}")), key=len, default="")
        quantity = name.removesuffix(f"/{sae}") if sae else name
        stage, _, rest = quantity.partition("/")
        if stage not in _STAGES or not rest:
            stage, rest = "", quantity
        found.setdefault(rest, []).append(Series(name=name, stage=stage, sae=sae))
    return found


def is_constant(points: Curve) -> bool:
    """Whether a curve stays within a thousandth of its largest value."""
    values = [value for _, value in points]
    return max(values) - min(values) <= _CONSTANT * max(map(abs, values))
