"""A live stream: rows equal the untouched model, each token once, the same bits in every run, bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.options import BufferOptions, ModelOptions
from deeplens_lightning.types import Provenance
from tests.stream.small_stream import TEXTS, small_stream
from tests.support.models import FAMILIES, save_model
from tests.support.ranks import ROOT

Tiny = Callable[[str], str]


def served(data: ActivationDataModule) -> Iterator[tuple[Tensor, Provenance]]:
    data.setup("fit")
    for batch in data.train_dataloader():
        where = data.provenance(batch)
        assert where is not None
        yield batch, where
    data.teardown("fit")


def keys(where: Provenance) -> list[tuple[int, int]]:
    return list(zip(where.document_index.tolist(), where.position.tolist(), strict=True))


def expected(folder: str, seq_length: int, split: str = "train") -> dict[tuple[int, int], int]:
    """Token id of every token that must become a row, by document and position."""
    from deeplens_lightning.text.documents import document_hash, is_heldout

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted: dict[tuple[int, int], int] = {}
    for i, text in enumerate(TEXTS):
        if text.strip() and is_heldout(document_hash(text), 0.2) == (split == "heldout"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted |= {(i, n): token for n, token in enumerate(ids)}
    return wanted


@torch.no_grad()
def reference(folder: str, path: str, seq_length: int) -> dict[tuple[int, int], Tensor]:
    """Rows from a hook on the untouched model, which runs one segment at a time."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, __, out: rows.append(out[0] if out.ndim == 3 else out)
    )
    found = {}
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        for begin in range(0, len(ids), seq_length):
            rows.clear()
            model(torch.tensor([ids[begin : begin + seq_length]]))
            found |= {(i, begin + n): row for n, row in enumerate(rows[0])}
    hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "module_path"), [("mlp_out", "mlp"), ("mlp_act", "mlp.act")])
def test_rows_equal_the_untouched_model_on_each_segment_alone(
    tiny: Tiny, family: str, kind: str, module_path: str
) -> None:
    layers = "h" if family == "gpt2" else "layers"
    path = module_path if family in ("gpt2", "gpt_neox") else module_path.replace("act", "act_fn")
    wanted = reference(tiny(family), f"{layers}.1.{path}", 32)
    data = small_stream(tiny(family), hook=kind)
    compared = 0
    for batch, where in served(data):
        rows = torch.stack([wanted[key] for key in keys(where)])
        assert relative_error(batch, rows).max() < 1e-5
        compared += len(batch)
    assert compared == len(expected(tiny(family), 32))


@given(
    batch=st.integers(1, 200),
    buffer=st.integers(1, 12),
    seq_length=st.sampled_from([5, 16, 32]),
    inference=st.integers(1, 5),
    pool=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_kept_token_is_served_exactly_once(
    tiny: Tiny, batch: int, buffer: int, seq_length: int, inference: int, pool: bool, seed: int
) -> None:
    data = small_stream(
        tiny("llama"),
        batch_size=batch,
        buffer_size=batch * buffer,
        seq_length=seq_length,
        inference_batch_size=inference,
        buffer_options=BufferOptions(shuffle_blocks=pool),
        seed=seed,
    )
    found: dict[tuple[int, int], int] = {}
    sizes = []
    for rows, where in served(data):
        assert rows.shape == (len(where.position), 32)
        sizes.append(len(rows))
        for key, token in zip(keys(where), where.token_id.tolist(), strict=True):
            assert key not in found
            found[key] = token
    assert found == expected(tiny("llama"), seq_length)
    assert set(sizes[:-1]) <= {batch}


def test_held_out_documents_are_the_validation_set_and_no_others(tiny: Tiny) -> None:
    data = small_stream(tiny("llama"), val_rows=10**6)
    data.setup("fit")
    found: list[tuple[int, int]] = []
    first = []
    for batch in data.val_dataloader():
        where = data.provenance(batch)
        assert where is not None
        found += keys(where)
        first.append(batch.clone())
    assert sorted(found) == sorted(expected(tiny("llama"), 32, "heldout"))
    for a, b in zip(data.val_dataloader(), first, strict=True):  # a second pass starts at the first row
        assert torch.equal(a, b)
    data.teardown("fit")


def test_two_runs_are_bit_identical_and_leave_the_process_alone(tiny: Tiny, untouched_rng: None) -> None:
    torch.set_grad_enabled(True)
    runs = [
        [batch for batch, _ in served(small_stream(tiny("gpt2"), normalize="standardize"))] for _ in range(2)
    ]
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = [batch for batch, _ in served(small_stream(tiny("gpt2"), normalize="standardize", seed=1))]
    assert not torch.equal(runs[0][0], other[0])
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_default_dtype_grad_mode_and_autocast_of_the_process_change_no_row(tiny: Tiny) -> None:
    plain = [batch for batch, _ in served(small_stream(tiny("gpt2")))]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            other = [batch for batch, _ in served(small_stream(tiny("gpt2")))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_several_hook_points_stay_aligned_through_the_shuffle(tiny: Tiny) -> None:
    data = small_stream(tiny("llama"), layer=[0, 2], hook=["mlp_in", "mlp_post"])
    assert data.d_in == {
        "layers.0.mlp_in": 32,
        "layers.2.mlp_in": 32,
        "layers.0.mlp_post": 64,
        "layers.2.mlp_post": 64,
    }
    alone = {
        name: {
            key: row
            for batch, where in served(small_stream(tiny("llama"), layer=None, hook=name))
            for key, row in zip(keys(where), batch, strict=True)
        }
        for name in data.hook_names
    }
    for batch, where in served(data):
        for name, rows in batch.items():
            assert torch.equal(rows, torch.stack([alone[name][key] for key in keys(where)]))


@pytest.mark.parametrize("normalize", ["mean_norm", "center", "standardize", "zscore"])
def test_normalised_rows_have_the_stated_statistics_and_can_be_converted_back(
    tiny: Tiny, normalize: str
) -> None:
    raw = {
        key: row
        for batch, where in served(small_stream(tiny("llama")))
        for key, row in zip(keys(where), batch, strict=True)
    }
    data = small_stream(tiny("llama"), normalize=normalize)
    scaled, back = [], []
    for batch, where in served(data):
        scaled.append(batch)
        back.append((data.scaling.undo(batch), torch.stack([raw[key] for key in keys(where)])))
    rows = torch.cat(scaled).double()
    for ours, theirs in back:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if normalize == "mean_norm":
        assert rows.norm(dim=1).mean() == pytest.approx(32**0.5, rel=0.01)
    else:
        assert rows.mean(0).abs().max() < 0.05
    if normalize == "standardize":
        assert rows.square().sum(1).mean() == pytest.approx(32, rel=0.02)
    if normalize == "zscore":
        assert (rows.std(0) - 1).abs().max() < 0.05


def test_outliers_are_dropped_and_counted(tiny: Tiny) -> None:
    data = small_stream(tiny("llama"), buffer_options=BufferOptions(max_norm_ratio=1.5))
    data.setup("fit")
    batches = [batch.clone() for batch in data.train_dataloader()]
    limit = data.serving.measured().max_norms["layers.1.mlp_out"]
    assert data.serving.loader is not None
    counts = data.serving.loader.stream.counts
    kept = sum(map(len, batches))
    assert counts["outliers"] > 0
    assert kept + counts["outliers"] == len(expected(tiny("llama"), 32))
    assert max(float(batch.norm(dim=1).max()) for batch in batches) <= limit * (1 + 1e-6)
    data.teardown("fit")


def test_bfloat16_models_keep_a_bfloat16_buffer_and_serve_float32(tiny: Tiny) -> None:
    data = small_stream(tiny("llama"), model_options=ModelOptions(kwargs={"dtype": torch.bfloat16}))
    data.setup("fit")
    loader = data.train_dataloader()
    assert next(iter(loader)).dtype == torch.float32
    assert loader.stream._buffers[0].dtype == torch.bfloat16
    data.teardown("fit")


MEMORY = """
import json, sys
import psutil
from tests.support.texts import texts
from deeplens_lightning.datamodule import ActivationDataModule
rows, served = int(sys.argv[2]), 0
data = ActivationDataModule(sys.argv[1], 0, "mlp_out", 2 * texts(450, 900), seq_length=64, inference_batch_size=16,
    batch_size=1024, buffer_size=rows, val_fraction=0, device="cpu")
data.setup("fit")
me = psutil.Process()
before, peak = me.memory_info().rss, 0
for batch in data.train_dataloader():
    peak, served = max(peak, me.memory_info().rss), served + len(batch)
stream = data.serving.loader.stream
print(json.dumps({"growth": peak - before, "buffer": stream.buffer_bytes, "served": served}))
"""

ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Settings of glibc with which freed memory goes back to the system, whatever the number of cores."""


def test_memory_is_the_buffer_and_little_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    small = {"layers": 1, "head_dim": 16, "intermediate_size": 64}
    folder = str(save_model(tmp_path_factory.mktemp("wide"), "llama", width=512, **small))
    growth = {}
    for rows in (4096, 65_536):
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, folder, str(rows)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | ONE_HEAP,
            timeout=600,
        )
        found = json.loads(out.stdout.splitlines()[-1])
        assert found["buffer"] == rows * 512 * 4
        assert found["served"] >= 2 * rows, "the buffer was never full"
        growth[rows] = found["growth"] - found["buffer"]
    # beyond the buffer: a model batch, batches of 2 MB, the block pool and maps, whatever the buffer's size
    assert growth[65_536] < 100e6
    assert growth[65_536] - growth[4096] < 65_536 * 100
