"""`trainer.predict` with `ShardPredictionWriter` writes a cache: interrupted, continued, and on several ranks."""

import random
import signal
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from deeplens_lightning.extraction.shard_prediction_writer import PassThrough, ShardPredictionWriter
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.shards import NonFiniteError, OtherConfigError, ShardStream, verify
from deeplens_lightning.text.documents import is_heldout
from tests.support.extraction import TinyDataModule, make_extraction
from tests.support.extraction import extract as extract_as_rank
from tests.support.models import save_model
from tests.support.ranks import launch
from tests.support.signalling import SendSignal
from tests.support.texts import texts, write_jsonl
from tests.support.training import trainer

NAMES = ["layers.1.mlp_out", "layers.2.mlp_out"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    documents = write_jsonl(folder / "texts.jsonl", texts(150, 800))
    return str(save_tiny_gpt2(folder / "model")), str(documents)


def save_tiny_gpt2(folder):
    return save_model(folder, "gpt2", width=64, positions=128)


def extract(folder, inputs, dm=None, shard_bytes=200_000, limit=None, **kwargs):
    writer = ShardPredictionWriter(folder, shard_bytes=shard_bytes, show_progress=False)
    run = trainer(folder, callbacks=[writer], limit_predict_batches=limit)
    dm = dm or TinyDataModule(*inputs, **kwargs)
    run.predict(PassThrough(), datamodule=dm, return_predictions=False)
    return writer.writer


def everything(folder):
    """All rows of a cache in order."""
    stream = ShardStream(folder, batch_size=512, shuffle="none", split="all")
    batches = list(stream.batches(stream.start(), 0))
    rows = {name: torch.cat([batch.rows[name] for batch in batches]) for name in NAMES}
    return rows, torch.cat([batch.provenance for batch in batches])


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "acts"
    extract(folder, inputs)
    return folder


def assert_identical(one, other):
    (rows, provenance), (same, too) = everything(one), everything(other)
    assert torch.equal(provenance, too)
    assert all(torch.equal(rows[name], same[name]) for name in NAMES)


def test_every_kept_token_is_written_once_and_equals_the_live_rows(inputs, whole):
    rows, provenance = everything(whole)
    live = list(make_extraction(*inputs))
    assert torch.equal(torch.cat([batch.provenance for batch in live]), provenance)
    for name in NAMES:
        assert torch.equal(torch.cat([batch.rows[name] for batch in live]), rows[name])
    tokens = sum(len(document.tokens) for document in make_extraction(*inputs).text.tokenized(0))
    assert len(provenance) == tokens
    assert len({(document, place) for _, document, place, _ in provenance.tolist()}) == tokens
    assert verify(whole).problems == []
    assert len(list(whole.glob("*.pt"))) > 10


def test_held_out_documents_are_those_of_the_text(whole):
    val = ShardStream(whole, batch_size=512, split="val", val_fraction=0.2)
    train = ShardStream(whole, batch_size=512, split="train", val_fraction=0.2)
    for stream, held in ((val, True), (train, False)):
        hashes = (
            torch.cat([batch.provenance[:, 0] for batch in stream.batches(stream.start(), 0)])
            .unique()
            .tolist()
        )
        assert hashes
        assert all(is_heldout(each, 0.2) == held for each in hashes)


def test_an_extraction_stopped_by_a_limit_of_the_trainer_can_be_continued(inputs, whole, tmp_path):
    for limit in (1, 7, 30):
        writer = extract(tmp_path, inputs, limit=limit)
        assert not writer.finished
    assert extract(tmp_path, inputs).complete
    assert_identical(whole, tmp_path)


def test_a_finished_cache_runs_no_model(inputs, whole, monkeypatch):
    stamps = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr("deeplens_lightning.stream.document_order.run_model", None)
    extract(whole, inputs)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == stamps


def test_another_configuration_is_refused_with_the_difference_named(inputs, whole):
    with pytest.raises(OtherConfigError, match=r"config.documents.max_rows: None there, 100 here"):
        extract(whole, inputs, max_rows=100)
    with pytest.raises(OtherConfigError, match=r"hook_points.layers.1.mlp_in"):
        extract(whole, inputs, hook="mlp_in")


def test_other_weights_are_another_configuration(inputs, whole, tmp_path):
    from transformers import GPT2LMHeadModel

    changed = save_tiny_gpt2(tmp_path / "model")
    model = GPT2LMHeadModel.from_pretrained(changed)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.01)
    model.save_pretrained(changed)
    with pytest.raises(OtherConfigError, match=r"config.model.weights"):
        extract(whole, (str(changed), inputs[1]))


def test_max_rows_ends_the_extraction_exactly_there(inputs, whole, tmp_path):
    writer = extract(tmp_path, inputs, max_rows=777)
    assert (writer.complete, writer.rows) == (True, 777)
    assert torch.equal(everything(tmp_path)[1], everything(whole)[1][:777])


def test_an_error_in_the_model_leaves_finished_shards_and_releases_the_folder(inputs, whole, tmp_path):
    dm = TinyDataModule(*inputs)
    dm.setup("predict")
    activations, calls = dm.extraction.model.activations, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("out of memory")
        return activations(*args)

    dm.setup = lambda stage: setattr(dm.extraction.model, "activations", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract(tmp_path, inputs, dm=dm)
    assert ShardStream(tmp_path, batch_size=1).rows > 0
    extract(tmp_path, inputs)
    assert_identical(whole, tmp_path)


def test_nan_from_the_model_stops_with_its_place(inputs, tmp_path):
    dm = TinyDataModule(*inputs)
    dm.setup("predict")
    with torch.no_grad():
        dm.extraction.model.base.h[1].mlp.c_proj.bias[3] = float("nan")
    dm.setup = lambda stage: None
    with pytest.raises(NonFiniteError, match="rows hold NaN or infinity, first token"):
        extract(tmp_path, inputs, dm=dm)


def test_a_data_module_without_a_model_is_refused_with_what_is_needed(tmp_path):
    class NoModel(L.LightningDataModule):
        def predict_dataloader(self):
            return []

    with pytest.raises(TypeError, match=r"needs a data module that computes activations, got NoModel"):
        extract(tmp_path, None, dm=NoModel())


def test_a_plan_has_rows_bytes_time_and_memory(inputs, whole):
    plan = make_extraction(*inputs).plan(shard_bytes=10**6)
    rows = len(everything(whole)[1])
    assert abs(plan.rows - rows) <= rows * 0.05
    assert plan.row_bytes == 2 * 64 * 4 + 32
    assert plan.memory > 2 * 10**6
    text = str(plan)
    assert f"{plan.rows:,} rows, {plan.rows * plan.row_bytes:,} bytes on disk" in text
    assert "min on 1 rank(s)" in text
    assert make_extraction(*inputs, max_rows=100).plan().rows == 100


def test_a_killed_extraction_run_again_equals_an_uninterrupted_one(inputs, whole, tmp_path, processes):
    """A run blocks when it has written two files more than it found; it is killed before that, or then."""
    chance, folder = random.Random(0), tmp_path / "acts"
    for _ in range(5):
        found = len(list(folder.glob("*.json")))
        process = processes.Process(target=extract_as_rank, args=(0, 1, str(folder), *inputs, found + 2))
        process.start()
        while len(list(folder.glob("*.json"))) <= found:
            assert process.is_alive(), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        process.join()
    process = processes.Process(target=extract_as_rank, args=(0, 1, str(folder), *inputs))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_identical(whole, folder)
    assert verify(folder).problems == []


def test_two_ranks_write_what_one_writes(inputs, whole, tmp_path):
    launch(2, extract_as_rank, str(tmp_path), *inputs)
    assert (tmp_path / "index.json").exists()
    assert {path.name[:9] for path in tmp_path.glob("*.pt")} == {"rank00000", "rank00001"}
    (rows, provenance), (by_two, of_two) = everything(whole), everything(tmp_path)
    order, order_of_two = (torch.argsort(p[:, 1] * 10**6 + p[:, 2]) for p in (provenance, of_two))
    assert torch.equal(provenance[order], of_two[order_of_two])
    for name in NAMES:
        assert relative_error(by_two[name][order_of_two], rows[name][order]).max() < 1e-5


def test_sigterm_saves_all_rows_and_the_same_command_continues(inputs, whole, tmp_path):
    writer = ShardPredictionWriter(tmp_path / "acts", shard_bytes=10**8, show_progress=False)
    run = trainer(tmp_path, callbacks=[SendSignal(signal.SIGTERM, batch=2), writer])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException) as stopped:
        run.predict(PassThrough(), datamodule=TinyDataModule(*inputs), return_predictions=False)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert writer.writer.shards == 1  # not full, but saved
    assert writer.writer.rows > 0
    assert not writer.writer.finished
    continued = extract(tmp_path / "acts", inputs)
    assert continued.shards > 1
    assert continued.complete
    assert_identical(tmp_path / "acts", whole)
