"""Open a dataset from the hub, local files, memory or the demo, and read its documents in a seeded order.

In: the user's `dataset_name`. Out: `Text`s. A source has one or more parts, which are read one after another. A place in
it is `(part, number)`, both counted in the epoch's order. A source with random access is one part, read in the order of
a seeded permutation. A streamed dataset has several parts, which are read in a seeded order of parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import numpy as np

from deeplens_lightning.permutation import Permutation
from deeplens_lightning.text.local_files import (
    files_at,
    files_at_each,
    format_of,
    looks_local,
    no_files,
    paths_in,
)

Row = str | Sequence[int]
"""A document of a source: text, or token ids."""

_NAME = re.compile(r"[\w.-]+(/[\w.-]+){1,2}")
"""A dataset on the hub, which may be followed by a configuration."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document of a source.

    Attributes:
        at: place of the document in the epoch's order, `(part, number)`.
        index: index of the document in the source, the same in every epoch.
        row: the text, or its token ids.
        reader: a state of the dataset to start reading from, and the `at` which that state belongs to; None to read
            from the start of the part.
    """

    at: tuple[int, int]
    index: int
    row: Row
    reader: tuple[Any, tuple[int, int]] | None = None


class Source(Protocol):
    """The protocol of a dataset that is read in an order given by a seed and an epoch number."""

    @property
    def identity(self) -> dict[str, str]:
        """Name, files and version of the dataset, for the fingerprint in checkpoints: name to value."""

    @property
    def parts(self) -> int:
        """Number of parts that can be read independently of each other."""

    def read(self, part: int, number: int, *, seed: int, epoch: int, reader: Any = None) -> Iterator[Text]:
        """Iterate over the documents of one part, from a given document on.

        Args:
            part: number of the part in the epoch's order.
            number: number of the first document in the part.
            seed: seed of the order.
            epoch: number of the epoch.
            reader: `Text.reader` of the first document, so that the documents before it need not be read; None to read
                and skip them.
        """


@dataclass(frozen=True)
class IndexedSource:
    """A dataset with random access, read in the order of a seeded permutation.

    Attributes:
        rows: a sequence of texts or of lists of token ids.
        identity: name, files and version of the dataset.
    """

    rows: Sequence[Row]
    identity: dict[str, str]

    parts = 1

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, part: int, number: int, *, seed: int, epoch: int, reader: Any = None) -> Iterator[Text]:
        """Iterate over documents from a given one on, as in `Source.read`; starting anywhere costs nothing."""
        del reader
        order = Permutation(len(self.rows), np.random.SeedSequence((seed, epoch)))
        for first in range(number, len(self.rows), 256):
            places = np.arange(first, min(first + 256, len(self.rows)))
            for place, index in zip(places.tolist(), order[places].tolist(), strict=True):
                yield Text((part, place), index, self.rows[index])


@dataclass(frozen=True)
class StreamedSource:
    """A streamed `datasets.IterableDataset`, read one of its shards after another; a part is a shard.

    Attributes:
        dataset: the dataset, with one column of texts or token ids.
        column: name of that column.
        identity: name, files and version of the dataset.
    """

    dataset: datasets.IterableDataset
    column: str
    identity: dict[str, str]

    STRIDE = 256

    @property
    def parts(self) -> int:
        """Number of shards of the dataset."""
        return cast(int, self.dataset.num_shards)

    def read(self, part: int, number: int, *, seed: int, epoch: int, reader: Any = None) -> Iterator[Text]:
        """Iterate over documents from a given one on, as in `Source.read`.

        Starting inside a part takes as long as `load_state_dict` of the dataset.
        """
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
        original = int(generator.permutation(self.parts)[part])
        dataset = self.dataset.shard(
            self.parts, original
        )  # a copy, because `load_state_dict` changes the dataset
        known, place = reader or (None, (part, 0))
        if known is not None and place[0] == part and place[1] <= number:
            dataset.load_state_dict(known)
        else:
            known, place = None, (part, 0)
        rows, seekable = iter(dataset), not _has_buffer(dataset)
        for n in range(place[1], 2**62):
            if n % self.STRIDE == 0 and n != place[1] and seekable:
                known, place = dataset.state_dict(), (part, n)
            row = next(rows, None)
            if row is None:
                return
            if n >= number:
                entered = (known, place) if known else None
                yield Text((part, n), original << 40 | n, row[self.column], entered)


def _has_buffer(dataset: datasets.IterableDataset) -> bool:
    """Whether a step of the dataset shuffles in a buffer, whose content is not in its `state_dict`."""
    step = dataset._ex_iterable
    while step is not None:
        if type(step).__name__ == "BufferShuffledExamplesIterable":
            return True
        step = getattr(step, "ex_iterable", None)  # private to `datasets`; the first step has none before it
    return False


class _Column(Sequence[Row]):
    """One column of a `datasets.Dataset`, read one row at a time."""

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        self.column = dataset.select_columns([column])
        self.name = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        return self.column[index][self.name]


def open_source(
    dataset_name: str
    | PathLike[str]
    | Sequence[str]
    | Sequence[PathLike[str]]
    | datasets.Dataset
    | datasets.IterableDataset,
    *,
    text_column: str = "text",
    split: str = "train",
    dataset_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """Open a dataset by name, or wrap a loaded one.

    Args:
        dataset_name: `demo:docs`; a list of texts; a `datasets` object; a file, folder or glob of txt, md, json, jsonl,
            ndjson or parquet files (optionally compressed), or a list of them, where a document is a whole txt or md
            file, a JSON line or a parquet row; or a hub id, which is streamed, optionally followed by a configuration
            (`wikitext/wikitext-103-v1`). A list whose items are all names of such files is a list of paths.
        text_column: name of the column of texts or token ids.
        split: split of a dataset on the hub.
        dataset_kwargs: keyword arguments for `datasets.load_dataset` (`name=`, `revision=`, `streaming=`, …).

    Raises:
        FileNotFoundError: a path matches no file, or the hub has no such dataset.
        ValueError: there is no such column or no document, the files have several formats, or a list mixes paths and
            texts.
    """
    kwargs = dict(dataset_kwargs or {})
    if isinstance(dataset_name, datasets.Dataset | datasets.IterableDataset):
        return _of_dataset(dataset_name, text_column, {"dataset": _dataset_name(dataset_name)})
    if isinstance(dataset_name, Mapping):
        raise ValueError(
            f"dataset_name is a dict of the splits {', '.join(dataset_name)}; give one of them, for example "
            f"dataset_name=dataset[{next(iter(dataset_name))!r}]"
        )
    if isinstance(dataset_name, PathLike):
        dataset_name = str(dataset_name)
    if not isinstance(dataset_name, str):
        if paths := paths_in(dataset_name):
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            return _of_files(f"{paths[0]}{more}", files_at_each(paths), text_column, kwargs)
        return _of_texts(dataset_name)
    if dataset_name == "demo:docs":
        from deeplens_lightning.demo.docs import demo_documents, source_versions

        versions = " ".join(f"{name} {version}" for name, version in source_versions().items())
        return IndexedSource(demo_documents(), {"dataset": dataset_name, "dataset versions": versions})
    if dataset_name.startswith("demo:"):
        raise ValueError(f"{dataset_name!r} is not an embedded dataset; the only one is 'demo:docs'")
    if files := files_at(dataset_name):
        return _of_files(dataset_name, files, text_column, kwargs)
    if looks_local(dataset_name):
        raise no_files(dataset_name)
    return _of_hub(dataset_name, text_column, split, kwargs)


def _of_texts(texts: Sequence[Any]) -> IndexedSource:
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(
            f"dataset_name is a list that must hold only texts (str), but it holds a value of type {type(wrong).__name__}"
            f": {wrong!r:.80}; for token ids give a datasets.Dataset with a column of them"
        )
    if not texts:
        raise ValueError("dataset_name is an empty list; give at least one text")
    if all(_NAME.fullmatch(text) for text in texts):
        raise ValueError(
            f"dataset_name is a list of names such as {texts[0]!r}, which would be read as texts: give the name of one "
            "dataset, or several datasets as datasets.interleave_datasets([...])"
        )
    digest = sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return IndexedSource(texts, {"dataset": f"{len(texts)} texts, sha256 {digest}"})


def _of_files(name: str, files: list[str], text_column: str, kwargs: dict[str, Any]) -> Source:
    formats = {format_of(file) for file in files}
    if len(formats) > 1:
        raise ValueError(
            f"{name!r} mixes {' and '.join(sorted(map(str, formats)))} files; give a glob that matches one format, "
            "such as '*.jsonl'"
        )
    kind = cast(str, formats.pop())
    if kind == "text":
        kwargs.setdefault("sample_by", "document")
    sizes = sha256("\0".join(f"{Path(f).name} {Path(f).stat().st_size}" for f in files).encode()).hexdigest()[
        :16
    ]
    identity = {"dataset": name, "dataset files": f"{len(files)} files, sha256 of names and sizes {sizes}"}
    dataset = datasets.load_dataset(kind, data_files=files, split="train", **kwargs)
    return _of_dataset(dataset, text_column, identity)


def _of_hub(name: str, text_column: str, split: str, kwargs: dict[str, Any]) -> Source:
    kwargs.setdefault("streaming", True)
    for repository, configuration in _repositories(name):
        try:
            dataset = datasets.load_dataset(
                repository, split=split, **({"name": configuration} if configuration else {}), **kwargs
            )
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            missing = error
            continue
        revision = str(dataset.info.version or "")
        return _of_dataset(
            dataset, text_column, {"dataset": name, "split": split, "dataset version": revision}
        )
    raise _no_dataset(name, missing) from missing


def _repositories(name: str) -> list[tuple[str, str | None]]:
    """Possible readings of `name`: a repository, or a repository followed by one of its configurations."""
    parts = name.split("/")
    if len(parts) == 3:
        return [(f"{parts[0]}/{parts[1]}", parts[2])]
    return [(name, None), (parts[0], parts[1])] if len(parts) == 2 else [(name, None)]


def _no_dataset(name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"dataset_name={name!r} is neither a local path nor found on the hub ({type(error).__name__}); check the name "
        "and the connection, or use dataset_name='demo:docs', which needs no connection"
    )


def _of_dataset(dataset: Any, column: str, identity: dict[str, str]) -> Source:
    if dataset.column_names is None:
        dataset = dataset._resolve_features()
    columns = list(dataset.column_names)
    if column not in columns:
        raise ValueError(
            f"the dataset has no column {column!r}; its columns are {', '.join(columns)}: set text_column= to one of them"
        )
    identity = identity | {"text_column": column}
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedSource(dataset.select_columns([column]), column, identity)
    if len(dataset) == 0:
        raise ValueError(f"dataset {identity['dataset']!r} is empty; give a dataset with at least one row")
    return IndexedSource(_Column(dataset, column), identity)


def _dataset_name(dataset: Any) -> str:
    fingerprint = dataset._fingerprint if isinstance(dataset, datasets.Dataset) else None
    name = dataset.info.dataset_name or type(dataset).__name__
    return f"{name} {fingerprint}" if fingerprint else str(name)
