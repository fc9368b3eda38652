"""The report shows all results of a run on one page that requests nothing and runs no script from the data."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deeplens_lightning.reporting.report import embedded_json, write_report
from deeplens_lightning.reporting.run_data import charts, find_run, read_run
from deeplens_lightning.reporting.run_folder import append_jsonl, note_earlier_part, parts_of, write_json

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
TOKENS = ["The", " cat", HOSTILE, "\u202eevil", "שלום", "😀", "\x00", "\n", "\u2028", "\ud800", " sat"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder as callbacks write it, with text everywhere that could break a page."""
    folder = tmp_path / "runs" / "version_0 & <b>"
    curve = [
        {
            "step": 10 * i,
            "train/fvu": 1 / (i + 1),
            "train/loss": 10.0 ** (-i / 10),
            "tokens_per_second": 1e3 + i,
        }
        for i in range(1, 60)
    ]
    append_jsonl(folder / "curves.jsonl", curve)
    append_jsonl(folder / "curves.jsonl", [{"step": s, "val/fvu": 0.5, "val/l0": 8.0} for s in (300, 590)])
    write_json(
        folder / "summary.json",
        {
            "tokens": 12345,
            "tokens_per_second": 678.9,
            "seconds": 18.0,
            "steps": 590,
            "hooks": ["layers.1.mlp_act"],
            "metrics": {"val/fvu": 0.0912, "val/l0": 32.0, "train/loss": float("nan")},
            "written": [str(folder)],
        },
    )
    counts = [0, 0, 1, 3, 50, 900, 20, 30, 500]
    write_json(
        folder / "latent_statistics" / "latest.json",
        {"step": 590, "heldout": {"rows": 1000, "counts": counts}},
    )
    write_json(
        folder / "top_tokens" / "latents.json",
        {
            "step": 590,
            "rows": 5000,
            "reads": ["layers.1.mlp_act"],
            "latents": [
                {"latent": 3, "frequency": 0.01, "contexts": [_context(2, 4.0), _context(4, 2.0)]},
                {"latent": 7, "frequency": 0.0, "contexts": []},
                {"latent": 11, "frequency": 0.5, "contexts": [_context(5, 9.0, known=False)]},
            ],
        },
    )
    lines = [
        {
            "step": step,
            "sample": sample,
            "position": i,
            "token_id": i,
            "token": token,
            "norm": 1.0 + i,
            "error": 0.5,
            "relative_error": 0.5 / (1 + i) if i else float("nan"),
            "l0": 2,
            "latents": [3, 99],
            "values": [0.7, 0.2],
        }
        for step in (100, 200)
        for sample in (0, 1)
        for i, token in enumerate(TOKENS)
    ]
    append_jsonl(folder / "single_samples" / "samples.jsonl", lines)
    return folder


def _context(peak: int, value: float, *, known: bool = True) -> dict[str, Any]:
    values = [value * (i == peak) if known or i == peak else None for i in range(len(TOKENS))]
    return {"value": value, "tokens": TOKENS, "values": values, "peak": peak, "document": 5, "position": 17}


def test_charts_are_drawn_latents_browsable_and_nothing_is_fetched(page: Any, run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page.open(path.as_uri())
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("typeof window.pwned") == "undefined"
    sections = page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == ["summary", "curves", "firing", "latents", "samples"]
    titles = page.evaluate("[...document.querySelectorAll('#curves .chart h3')].map(h => h.textContent)")
    assert titles == ["loss", "fvu", "tokens_per_second"]
    assert "Unchanged during the run: val/l0 8" in _text(page, "#curves")
    paths = page.evaluate(
        "[...document.querySelectorAll('#curves path.curve')].map(p => p.getAttribute('d'))"
    )
    assert len(paths) == 4  # train/fvu and val/fvu share a chart
    assert all("NaN" not in d and len(d) > 10 for d in paths)
    boxes = "[...document.querySelectorAll('#curves svg')].map(s => s.getBoundingClientRect().height)"
    assert all(height > 100 for height in page.evaluate(boxes))
    assert page.evaluate("document.querySelectorAll('#firing rect.bar').length") == 7
    assert "2 of 9 never fired on 1,000 rows; 2 fire on more than a tenth" in _text(page, "#firing")
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert "version_0 & <b>" in _text(page, "#name")
    page.evaluate(
        "document.querySelector('#curves svg').dispatchEvent(new PointerEvent('pointermove', {clientX: 200}))"
    )
    assert page.complaints() == []


def test_the_summary_names_the_files_of_its_weights(page: Any, run_dir: Path) -> None:
    page.open(write_report(run_dir).as_uri())
    assert "weights" not in _text(page, "#summary"), "an earlier release named no files"
    summary = json.loads((run_dir / "summary.json").read_text())
    best = {"monitor": "val/fvu", "value": 0.08, "step": 300, "file": "best.ckpt", "value_is_older": False}
    summary |= {
        "stopped": "SIGTERMException",
        "figures": {"step": 500, "file": None, "why_not": "saving is off"},
        "last": {"step": 590, "file": "<b>final.ckpt", "why_not": None},
        "best": [best],
    }
    write_json(run_dir / "summary.json", summary)
    page.open(write_report(run_dir).as_uri())
    text = _text(page, "#summary")
    for words in (
        "stopped bySIGTERMException",
        "weights of these figuresstep 500: these weights are not kept: saving is off",
        "last weightsstep 590: <b>final.ckpt",
        "best val/fvu0.08 at step 300: best.ckpt",
    ):
        assert words in text
    write_json(run_dir / "summary.json", summary | {"figures": summary["last"], "best": []})
    page.open(write_report(run_dir).as_uri())
    assert "weightsstep 590: <b>final.ckpt" in _text(page, "#summary")
    assert "figures" not in _text(page, "#summary")
    assert page.complaints() == []


def test_labels_of_an_axis_differ_and_nothing_is_drawn_where_nothing_changes(
    page: Any, tmp_path: Path
) -> None:
    lines = [
        {
            "step": 100_000 + 5000 * i,
            "train/l0": 32 + 0.1 * math.sin(i),
            "train/k": 32.0,
            "train/loss": 10.0 ** -(i / 5),
            "tiny": 1e-6 * i,
            "rows": 1e8 + 3e5 * i,
        }
        for i in range(1, 20)
    ]
    append_jsonl(tmp_path / "curves.jsonl", lines)
    page.open(write_report(tmp_path).as_uri())
    titles = page.evaluate("[...document.querySelectorAll('#curves .chart h3')].map(h => h.textContent)")
    assert sorted(titles) == ["l0", "loss", "rows", "tiny"]
    assert "Unchanged during the run: train/k 32" in _text(page, "#curves")
    labels = (
        "[...document.querySelectorAll('#curves svg')]"
        ".map(s => [...s.querySelectorAll('text')].map(t => t.textContent))"
    )
    ends = "[...document.querySelectorAll('#curves svg')].map(s => s.querySelectorAll('line.axis').length)"
    for texts, across in zip(page.evaluate(labels), page.evaluate(ends), strict=True):
        for axis in (texts[:across], texts[across:]):
            assert 2 <= len(axis) == len(set(axis)), axis
    assert page.complaints() == []


def test_training_and_validation_have_a_colour_each_in_every_chart(page: Any, run_dir: Path) -> None:
    lines = [{"step": s, "val/cosine": 0.9 + s / 10_000, "val/rows": float(s)} for s in (300, 590)]
    append_jsonl(run_dir / "curves.jsonl", lines)
    page.open(write_report(run_dir).as_uri())
    pairs = page.evaluate(
        "[...document.querySelectorAll('#curves .legend span')].map(s => [s.textContent.split(' ')[0], s.className])"
    )
    assert {style for stage, style in pairs if stage == "train"} == {"s0"}
    assert {style for stage, style in pairs if stage == "val"} == {"s1"}


def test_files_are_listed_once_below_the_folder_of_the_run(page: Any, run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    inside, outside = [f"{run_dir}/checkpoints/final.ckpt", f"{run_dir}/top_tokens"], "/elsewhere/a.txt"
    write_json(run_dir / "summary.json", summary | {"written": [str(run_dir), *inside, outside]})
    page.open(write_report(run_dir).as_uri())
    rows = page.evaluate("[...document.querySelectorAll('#summary tr')].map(r => r.innerText)")
    [written] = [row for row in rows if row.startswith("written")]
    assert list(filter(None, written.replace("\t", "\n").splitlines()))[1:] == [
        str(run_dir),
        "checkpoints/final.ckpt",
        "top_tokens",
        outside,
    ]


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window_and_words_are_whole(page: Any, run_dir: Path, width: int) -> None:
    words = ["The", " inter", "pret", "ability", " of", " un", "believ", "ably", " long", " words"] * 6
    lines = [
        {"step": 5, "sample": 0, "position": i, "token_id": i, "token": t, "norm": 1.0}
        for i, t in enumerate(words)
    ]
    append_jsonl(run_dir / "words" / "samples.jsonl", lines)
    page.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
    )
    try:
        page.open(write_report(run_dir).as_uri())
        page.evaluate(
            "{ const s = document.querySelector('#samples select'); s.value = '2'; s.dispatchEvent(new Event('change')) }"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tops = page.evaluate(
            "[...document.querySelectorAll('#samples .strip .token')].map(t => [t.textContent, "
            "t.getClientRects().length, [...t.getClientRects()].at(-1).top])"
        )
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
    assert len(tops) == len(words)
    for (_, _, above), (text, lines_of_token, below) in pairwise(tops):
        if not text.startswith(" ") and text != "The":
            assert (lines_of_token, above) == (1, below), text


def test_a_latent_is_shown_with_the_sae_that_it_belongs_to(page: Any, run_dir: Path) -> None:
    for sae, value in (("k=4", 2.0), ("k=8", 5.0)):
        entry = {"latent": 3, "frequency": 0.1, "contexts": [_context(2, value)]}
        content = {"step": 590, "rows": 50, "sae": sae, "reads": ["layers.1.mlp_act"], "latents": [entry]}
        write_json(run_dir / f"top_tokens-{sae}" / "latents.json", content)
    line = {"step": 5, "sample": 0, "position": 0, "token_id": 0, "token": "a", "norm": 1.0, "sae": "k=8"}
    append_jsonl(run_dir / "single_samples-k=8" / "samples.jsonl", [line | {"latents": [3], "values": [1.0]}])
    page.open(write_report(run_dir).as_uri())
    page.evaluate(
        "{ const s = document.querySelector('#samples select'); s.value = '2'; s.dispatchEvent(new Event('change')) }"
    )
    page.evaluate("document.querySelector('#samples td button').click()")
    assert _text(page, "#latents .card h3") == "latent 3 of k=8"
    assert "reads layers.1.mlp_act; above 0 on 10.0% of 50 rows at step 590" in _text(page, "#latents .card")
    shown = "document.querySelectorAll('#latents .list button[aria-current=\"true\"]')"
    assert page.evaluate(f"[...{shown}].map(b => b.textContent)") == ["k=8 · 35"]
    assert page.complaints() == []


def test_latents_can_be_searched_opened_and_stepped_through(page: Any, run_dir: Path) -> None:
    page.open(write_report(run_dir).as_uri())
    listed = "[...document.querySelectorAll('#latents .list button')].map(b => b.dataset.latent)"
    assert page.evaluate(listed) == ["11", "3", "7"]  # strongest first
    assert "latent 11" in _text(page, "#latents .card h3")
    page.evaluate("document.querySelector('#latents .list button[data-latent=\"3\"]').click()")
    assert page.evaluate("document.querySelectorAll('#latents .context').length") == 2
    peak = page.evaluate("document.querySelector('#latents .context .peak').textContent")
    assert peak == HOSTILE
    style = "getComputedStyle(document.querySelector('#latents .context .peak')).backgroundColor"
    assert page.evaluate(style) not in ("rgba(0, 0, 0, 0)", "transparent")
    shown = page.evaluate(
        "[...document.querySelector('#latents .context').querySelectorAll('.token')].map(t => t.textContent)"
    )
    assert shown[3] == "<U+202E>evil"
    assert shown[4:] == ["שלום", "😀", "<U+0000>", "⏎", "<U+2028>", "<U+D800>", " sat"]
    key = "new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true})"
    page.evaluate(f"document.querySelector('#latents .list').dispatchEvent({key})")
    assert "It never fired" in _text(page, "#latents .card")
    field = "const i = document.querySelector('#latents input'); "
    find = field + "i.value = '{}'; i.dispatchEvent(new Event('input'))"
    page.evaluate(f"{{ {find.format('😀')} }}")
    assert page.evaluate(listed) == ["11"]
    page.evaluate(f"{{ {find.format('nothing has this')} }}")
    assert "No latent" in _text(page, "#latents .card")
    assert page.complaints() == []


def test_samples_are_shown_step_by_step_and_link_to_latents(page: Any, run_dir: Path) -> None:
    page.open(write_report(run_dir).as_uri())
    assert "step 200" in _text(page, "#samples .controls")
    set_step = (
        "const s = document.querySelector('#samples input'); s.value = 0; s.dispatchEvent(new Event('input'))"
    )
    page.evaluate(f"{{ {set_step} }}")
    assert "step 100" in _text(page, "#samples .controls")
    assert page.evaluate("document.querySelectorAll('#samples .strip .token').length") == len(TOKENS)
    page.evaluate("document.querySelectorAll('#samples .strip .token')[4].click()")
    assert "שלום" in page.evaluate("document.querySelectorAll('#samples tr')[1].textContent")
    page.evaluate("document.querySelector('#samples td button').click()")
    assert "latent 3" in _text(page, "#latents .card h3")
    assert page.complaints() == []


def _text(page: Any, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def test_the_page_is_one_file_and_escapes_markup_in_the_data(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "<img" not in text
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    before, _, rest = text.partition('<script type="application/json"')
    assert "src=" not in before + rest.partition("</script>")[2]
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "version_0 &amp; &lt;b&gt;" in text


def test_embedded_json_cannot_leave_its_element() -> None:
    text = embedded_json({"a": "</script><!--&\u2028\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\ud800"}


def test_a_folder_of_runs_gives_the_newest(run_dir: Path, tmp_path: Path) -> None:
    assert write_report(run_dir.parent) == run_dir / "report.html"
    assert write_report(run_dir, tmp_path / "elsewhere" / "a.html") == tmp_path / "elsewhere" / "a.html"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds nothing to report.*FitSummary callback or a CSVLogger"
    ):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "missing")


def test_curves_are_read_from_csv_and_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    for logger in (CSVLogger(tmp_path), TensorBoardLogger(tmp_path, version="tb")):
        for step in range(3):
            logger.log_metrics({"train/loss": step / 2, "epoch": 0, "nan": math.nan}, step=step)
        logger.save()
        curves = read_run(Path(logger.log_dir)).curves
        assert curves == {"train/loss": [(0, 0.0), (1, 0.5), (2, 1.0)]}
        write_report(logger.log_dir)


def test_steps_logged_again_after_a_resume_count_once_and_an_incomplete_line_is_ignored(
    tmp_path: Path,
) -> None:
    append_jsonl(
        tmp_path / "curves.jsonl", [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 2, "a": 3.0}]
    )
    with (tmp_path / "curves.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    assert read_run(tmp_path).curves == {"a": [(1, 1.0), (2, 3.0)]}


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "curves.jsonl", [{"step": i, "a": float(i)} for i in range(5001)])
    curve = read_run(tmp_path).curves["a"]
    assert len(curve) <= 800
    assert curve[-1] == (5000, 5000.0)
    assert {b[0] - a[0] for a, b in pairwise(curve)} == {7}


def test_a_run_is_read_with_the_folders_from_which_it_was_resumed(page: Any, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"version_{i}" for i in range(3))
    append_jsonl(first / "curves.jsonl", [{"step": s, "a": 1.0} for s in range(1, 8)])
    append_jsonl(second / "curves.jsonl", [{"step": s, "a": 2.0} for s in range(5, 12)])
    append_jsonl(third / "curves.jsonl", [{"step": s, "a": 3.0} for s in range(11, 13)])
    note_earlier_part(second, first, 4)
    note_earlier_part(third, second, 10)
    content = {
        "step": 4,
        "rows": 9,
        "reads": ["h"],
        "latents": [{"latent": 1, "frequency": 0.5, "contexts": []}],
    }
    write_json(second / "top_tokens" / "latents.json", content)
    run = read_run(third)
    assert run.curves["a"] == [(s, 1.0 if s <= 4 else 2.0 if s <= 10 else 3.0) for s in range(1, 13)]
    assert [entry["latent"] for entry in run.latents] == [1]
    page.open(write_report(third).as_uri())
    assert _text(page, "#earlier") == f"continues {first}, {second}"
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    assert [part.name for part, _ in parts_of(moved / "version_2")] == ["version_0", "version_1", "version_2"]
    note_earlier_part(moved / "version_2", None, 0)
    assert len(parts_of(moved / "version_2")) == 1


def test_the_folders_of_a_run_are_not_runs(run_dir: Path) -> None:
    line = {"step": 1, "sample": 0, "position": 0, "token_id": 0, "token": "a", "norm": 1.0}
    append_jsonl(run_dir / "single_samples" / "single_samples" / "samples.jsonl", [line])
    assert find_run(run_dir.parent) == run_dir


def test_curves_of_a_quantity_share_a_chart_also_in_a_grid() -> None:
    names = [
        "train/fvu/k=4",
        "val/fvu/k=4",
        "val/fvu/lr=1e-3/2",
        "latents/rows/k=4",
        "latents/rows",
        "train/loss",
    ]
    found = charts({name: [(1, 1.0)] for name in names})
    shown = {title: [(each.stage, each.sae) for each in series] for title, series in found.items()}
    assert shown == {
        "fvu": [("train", "k=4"), ("val", "k=4"), ("val", "lr=1e-3/2")],
        "latents/rows": [("", "k=4"), ("", "")],
        "loss": [("train", "")],
    }
