"""`write_report`: write one HTML page that shows a run and needs no network.

The page holds its own style, script and data. The data are JSON inside a script element, escaped so that no text of a
dataset can end that element. The script inserts text only as text, never as markup. A content security policy forbids
every script and style but the page's own, and every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import asdict
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.reporting.run_data import RunData, charts, find_run, is_constant, read_run

_SCRIPTS = ("charts.js", "latents.js", "samples.js", "report.js")


def write_report(run_dir: str | PathLike[str], out: str | PathLike[str] | None = None) -> Path:
    """Write the page of a run: curves, summary, firing histograms, latents, and single samples over time.

    A run that was resumed is shown from its first step, with the folders that it was resumed from.

    Args:
        run_dir: the run's folder (it holds `curves.jsonl` or `metrics.csv`), or a folder of runs, of which the newest
            is shown.
        out: path of the page; default `report.html` in the run's folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder does not exist or holds no run.
    """
    folder = find_run(Path(run_dir))
    target = folder / "report.html" if out is None else Path(out)
    write_whole(target, page(read_run(folder)).encode())
    return target


def page(run: RunData) -> str:
    """The HTML page of a run."""
    data = asdict(run) | {"charts": _charts(run), "constant": _constant(run)}
    style = _asset("report.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();\n"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("report.html")).substitute(
        title=html.escape(run.name), policy=policy, style=style, script=script, data=embedded_json(data)
    )


def _charts(run: RunData) -> list[dict[str, Any]]:
    """What is drawn: title and curves; a single point is drawn only where no summary shows its value."""
    return [
        {"title": title, "series": [asdict(each) for each in series]}
        for title, series in charts(run.curves).items()
        if not all(is_constant(run.curves[each.name]) for each in series)
        or (run.summary is None and any(len(run.curves[each.name]) == 1 for each in series))
    ]


def _constant(run: RunData) -> dict[str, float]:
    """The values of curves that stay the same."""
    drawn = {each["name"] for chart in _charts(run) for each in chart["series"]}
    return {
        name: points[-1][1]
        for name, points in run.curves.items()
        if name not in drawn and len(points) > 1 and not name.startswith("single_sample/")
    }


def embedded_json(value: Any) -> str:
    """JSON that is safe inside a script element: ASCII alone, with `<`, `>` and `&` escaped.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _asset(name: str) -> str:
    """Text of a file of the page."""
    return files("deeplens_lightning.reporting").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The hash by which a content security policy allows a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
