"""`FromHuggingFace` gives the rows of an independent loop over the untouched model."""

import inspect
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deeplens_lightning.extraction.from_huggingface import FromHuggingFace
from deeplens_lightning.model.isolation import relative_error
from tests.support.models import save_model
from tests.support.texts import texts, write_jsonl

TEXTS = texts(150, 800)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model"), "gpt2", width=64, positions=128))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bos")
    return str(save_model(folder, "gpt2", width=64, positions=128, bos=True))


@pytest.fixture
def dataset(tmp_path):
    return str(write_jsonl(tmp_path / "texts.jsonl", TEXTS))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def reference(folder, samples, layer, seq_length):
    """Run one text at a time through the whole model, with a hook on the activation function of one layer."""
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = []
    whole.transformer.h[layer].mlp.act.register_forward_hook(lambda m, i, output: seen.append(output[0]))
    with torch.no_grad():
        for text in samples:
            ids = tokenizer(text, truncation=True, max_length=seq_length, return_tensors="pt")["input_ids"]
            if text.strip():
                whole(ids)
    return torch.cat(seen)


def extracts_the_reference(folder, samples, dataset, capsys, **sizes):
    """Pass every argument of the tutorial's call, with a local model and dataset instead of those of the hub."""
    extractor = FromHuggingFace(
        hf_model=folder,
        dataset_name=dataset,
        inference_batch_size=16,
        device="auto",
        save_features=True,
        **sizes,
    )
    features = extractor.extract_features()
    expected = reference(folder, samples[: sizes["num_samples"]], sizes["layer"], sizes["seq_length"])
    assert features.shape == expected.shape == (len(expected), 256)
    assert relative_error(features, expected).max() < 1e-5
    path = Path("saved_features") / f"features_layer_{sizes['layer']}_{len(expected)}.pt"
    assert torch.equal(torch.load(path, weights_only=True), features)
    assert str(path) in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["model", "with_bos"])
def test_the_tutorials_call_gives_the_reference_rows_and_file(kind, dataset, capsys, request):
    folder = request.getfixturevalue(kind)
    extracts_the_reference(folder, TEXTS, dataset, capsys, layer=1, num_samples=120, seq_length=64)


def test_the_tutorials_own_sizes_give_the_reference_rows(tmp_path, capsys):
    """With long documents, and with fewer texts than `num_samples`."""
    folder = str(save_model(tmp_path / "lm", "gpt2", width=64, layers=4, positions=1024))
    samples = [*TEXTS, "\n\n".join(TEXTS), "\n".join(TEXTS[30:90])]
    dataset = write_jsonl(tmp_path / "fineweb.jsonl", samples)
    sizes = {"layer": 3, "num_samples": 25000, "seq_length": 1024}
    extracts_the_reference(folder, samples, str(dataset), capsys, **sizes)


def test_defaults_are_those_of_deeplens():
    defaults = {name: p.default for name, p in inspect.signature(FromHuggingFace).parameters.items()}
    assert list(defaults.items())[:8] == [
        ("hf_model", "gpt2"),
        ("layer", 6),
        ("dataset_name", "HuggingFaceFW/fineweb"),
        ("num_samples", 25_000),
        ("seq_length", 128),
        ("inference_batch_size", 16),
        ("device", "auto"),
        ("save_features", True),
    ]


def test_pieces_together_are_the_whole_and_nothing_is_saved(model, dataset, tmp_path):
    extractor = FromHuggingFace(model, 1, dataset, num_samples=100, seq_length=64, inference_batch_size=4)
    pieces = list(extractor.extract_features_batched())
    assert max(map(len, pieces)) <= 4 * 64
    assert not (tmp_path / "saved_features").exists()
    assert torch.equal(torch.cat(pieces), extractor.extract_features())


def test_batch_size_and_stopping_early_change_no_row(model, dataset):
    one, other = (
        FromHuggingFace(
            model, 1, dataset, num_samples=n, seq_length=64, inference_batch_size=size, save_features=False
        ).extract_features()
        for n, size in ((60, 1), (100, 7))
    )
    assert relative_error(other[: len(one)], one).max() < 1e-5


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_come_in_the_datasets_own_order(model, streaming):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data = data.to_iterable_dataset(num_shards=3) if streaming else data
    extractor = FromHuggingFace(model, 0, data, num_samples=50, seq_length=32, save_features=False)
    assert relative_error(extractor.extract_features(), reference(model, TEXTS[:50], 0, 32)).max() < 1e-5


def test_a_loaded_model_gives_the_reference_rows_and_is_unchanged(model, dataset):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    extractor = FromHuggingFace(loaded, -1, dataset, num_samples=20, seq_length=32, save_features=False)
    rows = extractor.extract_features()
    assert extractor.layer == 2
    assert relative_error(rows, reference(model, TEXTS[:20], 2, 32)).max() < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_other_hook_points_can_be_extracted(model, dataset):
    extractor = FromHuggingFace(
        model, 1, dataset, num_samples=10, seq_length=32, hook="resid_post", save_features=False
    )
    assert extractor.extract_features().shape[1] == 64


def test_mistakes_are_named_before_any_weight_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("deeplens_lightning.extraction.from_huggingface.FrozenModel.load", None)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "a", "title": "b"}\n')
    with pytest.raises(ValueError, match="no column 'text'; its columns are body, title"):
        FromHuggingFace(model, 1, str(lines))
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        FromHuggingFace(model, 7, ["a"])
    with pytest.raises(ValueError, match="seq_length=1024 exceeds the model's 128 positions"):
        FromHuggingFace(model, 1, ["a"], seq_length=1024)
    with pytest.raises(ValueError, match="at least 1, got 0 and 16"):
        FromHuggingFace(model, 1, ["a"], num_samples=0)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FromHuggingFace("/no/such/model", 1, ["a"])


def test_samples_without_any_text_are_an_error(model):
    with pytest.raises(ValueError, match="the first 2 samples hold no text"):
        FromHuggingFace(model, 1, ["", " ", "a"], num_samples=2).extract_features()


def files():
    return sorted(file.name for file in Path("saved_features").iterdir())


def test_the_file_is_named_for_its_hook_point_unless_it_is_the_tutorials(model, capsys):
    hooks = ["mlp_act", "mlp_out", "blocks.1.hook_resid_post", "h.1.mlp.act:in", "final_norm"]
    extracted = {hook: FromHuggingFace(model, 1, TEXTS[:9], hook=hook).extract_features() for hook in hooks}
    n = len(extracted["mlp_act"])
    named = {
        "mlp_act": f"features_layer_1_{n}.pt",
        "mlp_out": f"features_layers.1.mlp_out_{n}.pt",
        "blocks.1.hook_resid_post": f"features_layers.1.resid_post_{n}.pt",
        "h.1.mlp.act:in": f"features_h.1.mlp.act_in_{n}.pt",
        "final_norm": f"features_final_norm_{n}.pt",
    }
    assert files() == sorted(named.values())
    printed = capsys.readouterr().out
    for hook, name in named.items():
        path = Path("saved_features") / name
        assert torch.equal(torch.load(path, weights_only=True), extracted[hook])
        assert f"Features saved to {path}" in printed


def test_no_file_with_other_features_is_replaced(model, capsys):
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    first = FromHuggingFace(model, 1, TEXTS[:9]).extract_features()
    name = f"features_layer_1_{len(first)}"
    folder = Path("saved_features")
    (folder / f"{name}-2.pt").write_bytes(b"damaged")
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    FromHuggingFace(model, 1, TEXTS[:9]).extract_features()  # the same features: they are there
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps
    other = FromHuggingFace(changed, 1, TEXTS[:9]).extract_features()
    assert f"Features saved to saved_features/{name}-3.pt" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert torch.equal(torch.load(folder / f"{name}.pt", weights_only=True), first)
    assert torch.equal(torch.load(folder / f"{name}-3.pt", weights_only=True), other)


def test_several_hook_points_are_refused_with_what_to_do(model):
    with pytest.raises(
        ValueError, match=r"one hook point, but layers.0.mlp_act, layers.1.mlp_act were named"
    ):
        FromHuggingFace(model, [0, 1], ["a text"])


def with_memory(monkeypatch, nbytes):
    monkeypatch.setattr("deeplens_lightning.extraction.saved_features.machine_memory", lambda: nbytes)


def mapped_from(tensor):
    """Path of the file that the memory of a tensor is mapped from; empty if it is in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return " ".join(line.split()[5:])
    raise AssertionError("the tensor is nowhere")


def test_features_larger_than_half_of_the_memory_are_mapped_from_their_file(
    model, dataset, monkeypatch, capsys
):
    extractor = FromHuggingFace(model, 1, dataset, num_samples=60, seq_length=64)
    features = torch.cat(list(extractor.extract_features_batched()))
    with_memory(monkeypatch, 2 * features.nbytes - 1)
    mapped = extractor.extract_features()
    [name] = files()
    path = Path("saved_features").resolve() / name
    assert (name, mapped_from(mapped)) == (f"features_layer_1_{len(features)}.pt", str(path))
    assert torch.equal(mapped, features)
    mapped += 1
    assert torch.equal(torch.load(path, weights_only=True), features)
    assert "more than half of this machine's memory: they are written to a file" in capsys.readouterr().out
    with_memory(monkeypatch, 2 * features.nbytes)
    assert mapped_from(extractor.extract_features()) in ("", "[heap]")


def no_model(monkeypatch):
    monkeypatch.setattr("deeplens_lightning.extraction.from_huggingface.run_model", None)


def test_features_that_fit_nowhere_are_refused_before_the_model_runs(model, dataset, monkeypatch):
    no_model(monkeypatch)
    with_memory(monkeypatch, 200_000)
    with pytest.raises(
        ValueError, match=r"the features of 150 samples take about 0\.0\d+ GB.*half of this machine"
    ) as big:
        FromHuggingFace(model, 1, dataset, seq_length=64, save_features=False).extract_features()
    for word in (
        "extract_features_batched()",
        "`deeplens-lightning extract`",
        "give save_features=True",
        "num_samples",
    ):
        assert word in str(big.value)
    monkeypatch.setattr(
        "deeplens_lightning.extraction.saved_features.LocalFolder.free_bytes", lambda folder: 300_000
    )
    with pytest.raises(
        ValueError, match=r"twice its size in saved_features, where 0\.0003 GB are free"
    ) as full:
        FromHuggingFace(model, 1, dataset, seq_length=64).extract_features()
    assert "give save_features=True" not in str(full.value)
    assert not Path("saved_features").exists()


def test_a_stream_is_refused_without_reading_all_of_it(model, monkeypatch):
    no_model(monkeypatch)
    with_memory(monkeypatch, 2_000_000)
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"text": TEXTS[number % 100]}

    stream = datasets.IterableDataset.from_generator(endless)
    with pytest.raises(ValueError, match=r"the features of 25,000 samples take about 2.1 GB"):
        FromHuggingFace(model, 1, stream, save_features=False).extract_features()
    assert len(read) < 2000
