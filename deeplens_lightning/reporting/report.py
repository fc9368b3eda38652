"""`write_report`: one HTML page that shows a run, self-contained and without a network.

The page holds its own style, script and data. Data are JSON in a block that no markup can leave, the
script writes text as text only, and a content security policy forbids everything that is not this
page's own: nothing is fetched, whatever the text of a dataset says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

from deeplens_lightning.reporting.run_data import find_run, names_of, read_run

_SCRIPTS = ("charts.js", "latents.js", "samples.js", "report.js")


def write_report(run_dir: str | PathLike[str], out: str | PathLike[str] | None = None) -> Path:
    """Write the page of a run: curves, summary, firing histogram, latents, single samples over time.

    Args:
        run_dir: the run's folder (where its `curves.jsonl` or `metrics.csv` lies), or a folder of runs,
            of which the newest is taken.
        out: the page's path; default `report.html` in the run's folder.

    Returns:
        Where the page was written.

    Raises:
        FileNotFoundError: there is no run.
    """
    folder = find_run(Path(run_dir))
    target = folder / "report.html" if out is None else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page(read_run(folder)), encoding="utf-8")
    temporary.replace(target)
    return target


def page(run: dict[str, Any]) -> str:
    """The HTML of `run_data.read_run`'s dictionary."""
    run = run | {"charts": names_of(run["curves"])}
    style = _asset("report.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();\n"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("report.html")).substitute(
        title=html.escape(run["name"]), policy=policy, style=style, script=script, data=embedded_json(run)
    )


def embedded_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, nothing that ends a line."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _asset(name: str) -> str:
    return files("deeplens_lightning.reporting").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
