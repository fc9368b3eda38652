"""Documents from every kind of source, in a seeded order, read from any position."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from deeplens_lightning.text.sources import IndexedSource, Source, StreamedSource, open_source
from tests.support.texts import texts

TEXTS = texts(30)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "txt").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "txt" / f"{i:02}.txt").write_text(text)
    rows = [{"text": text, "url": str(i)} for i, text in enumerate(TEXTS)]
    for part in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in rows[10 * part : 10 * part + 10])
        (folder / f"part-{part}.jsonl").write_text(lines)
    datasets.Dataset.from_list(rows).to_parquet(folder / "all.parquet")
    return folder


def rows(source: Source, epoch: int = 0) -> list[str]:
    return [str(t.row) for k in range(source.parts) for t in source.read(k, 0, seed=1, epoch=epoch)]


@pytest.mark.parametrize("name", ["part-*.jsonl", "all.parquet", "part-0.jsonl"])
def test_local_files_one_document_a_row(files: Path, name: str) -> None:
    source = open_source(str(files / name))
    wanted = TEXTS[:10] if name == "part-0.jsonl" else TEXTS
    assert sorted(rows(source)) == sorted(wanted)


def test_local_files_one_document_a_txt_file(files: Path) -> None:
    assert sorted(rows(open_source(str(files / "txt")))) == sorted(TEXTS)


PARTS = ["part-0.jsonl", "part-1.jsonl"]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("names", "count"),
    [(PARTS, 20), ([*PARTS, PARTS[0]], 20), (["part-*.jsonl"], 30), (["txt"], 30)],
    ids=str,
)
def test_a_list_of_paths_is_read_as_the_files(files: Path, names: list[str], count: int, kind: type) -> None:
    found = rows(open_source([kind(str(files / name)) for name in names]))
    assert sorted(found) == sorted(TEXTS[:count])


def test_one_path_object_is_read_as_its_file(files: Path) -> None:
    assert rows(open_source(files / "part-0.jsonl")) == rows(open_source(str(files / "part-0.jsonl")))


def test_relative_paths_and_names_with_spaces_are_paths(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my texts.jsonl").write_text((files / "part-1.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    assert sorted(rows(open_source(["my texts.jsonl"]))) == sorted(TEXTS[10:20])


@pytest.mark.parametrize(
    "texts_", [["See README.md", "b"], ["read a.jsonl\nnow"], ["a b", "a.txt"], ["cat", "dog"], ["x" * 5000]]
)
def test_texts_that_mention_files_are_texts(texts_: list[str]) -> None:
    assert sorted(rows(open_source(texts_))) == sorted(texts_)


def test_identity_of_a_list_of_paths_is_that_of_the_files(files: Path, tmp_path: Path) -> None:
    one, other = (open_source([str(files / name) for name in names]) for names in (PARTS, [PARTS[0]]))
    assert one.identity["dataset files"] != other.identity["dataset files"]


@pytest.mark.parametrize("sharded", [True, False])
def test_reading_a_stream_can_start_at_any_document(files: Path, sharded: bool) -> None:
    name = [str(files / f"part-{i}.jsonl") for i in range(3)] if sharded else str(files / "all.parquet")
    dataset = datasets.load_dataset(
        "json" if sharded else "parquet", data_files=name, split="train", streaming=True
    )
    source = open_source(dataset)
    assert isinstance(source, StreamedSource)
    assert source.parts == (3 if sharded else 1)
    assert sorted(rows(source)) == sorted(TEXTS)
    for part in range(source.parts):
        whole = list(source.read(part, 0, seed=1, epoch=0))
        for number in (0, 1, 7, len(whole)):
            rest = list(source.read(part, number, seed=1, epoch=0))
            assert [(t.at, t.index, t.row) for t in rest] == [(t.at, t.index, t.row) for t in whole[number:]]


def test_reading_a_stream_can_start_at_a_saved_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedSource, "STRIDE", 8)
    dataset = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(100)]).to_iterable_dataset()
    source = open_source(dataset)
    whole = list(source.read(0, 0, seed=0, epoch=0))
    here = whole[75]
    assert here.reader is not None
    assert here.reader[1] == (0, 72)
    rest = list(source.read(0, 75, seed=0, epoch=0, reader=here.reader))
    assert [t.row for t in rest] == [t.row for t in whole[75:]]


def test_pretokenised_columns_are_documents_of_ids() -> None:
    source = open_source(datasets.Dataset.from_dict({"ids": [[1, 2], [3]]}), text_column="ids")
    assert sorted(list(t.row) for t in source.read(0, 0, seed=0, epoch=0)) == [[1, 2], [3]]


def test_the_demo_is_real_english_in_a_deterministic_order() -> None:
    source = open_source("demo:docs")
    assert isinstance(source, IndexedSource)
    assert sum(len(text) for text in source.rows) > 8_000_000
    assert open_source("demo:docs").rows == source.rows
    assert len(set(source.rows)) == len(source.rows)
    assert any("tensor" in str(text) for text in source.rows)


def test_identity_changes_with_the_texts() -> None:
    assert open_source(["a", "b"]).identity == open_source(["a", "b"]).identity
    assert open_source(["a", "b"]).identity != open_source(["a", "c"]).identity


@pytest.mark.parametrize(
    ("name", "more", "error", "words"),
    [
        ("/no/such/*.jsonl", {}, FileNotFoundError, "matches no"),
        ("missing.parquet", {}, FileNotFoundError, "matches no"),
        ("demo:novels", {}, ValueError, "'demo:docs'"),
        ([], {}, ValueError, "empty list"),
        (["a", 3], {}, ValueError, "must hold only texts"),
        (["/no/such/a.jsonl", "b.jsonl"], {}, FileNotFoundError, "'/no/such/a.jsonl' matches no"),
        ([Path("a.jsonl"), "a text"], {}, ValueError, "'a.jsonl', is a path, and 'a text' is not"),
        (["HuggingFaceFW/fineweb", "wikitext/wikitext-103-v1"], {}, ValueError, "interleave_datasets"),
        (datasets.Dataset.from_dict({"body": ["x"]}), {}, ValueError, "its columns are body"),
        (datasets.Dataset.from_dict({"text": []}), {}, ValueError, "is empty"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["x"]})),
            {},
            ValueError,
            "one of them",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_fix(
    name: object, more: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_source(name, **more)  # type: ignore[arg-type]


def test_mixed_formats_and_unknown_files_are_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixes"):
        open_source(str(files))
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match="convert it"):
        open_source(str(tmp_path / "x.pdf"))


def test_a_missing_column_names_the_columns_there_are(files: Path) -> None:
    with pytest.raises(ValueError, match="its columns are text, url"):
        open_source(str(files / "all.parquet"), text_column="content")


def test_a_hub_dataset_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a local path nor found on the hub"):
        open_source("nobody/nothing-here")
