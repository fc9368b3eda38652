"""The dictionary without Lightning: what it imports, its settings, and the classes that are built around it."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import deeplens_lightning
from deeplens_lightning.sae import Dictionary, SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.interop import saelens
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D = 16


def batches(n: int) -> list[torch.Tensor]:
    return [codes(64, 24, 2, seed=i) @ dictionary(24, D) for i in range(n)]


def imported(file: Path) -> set[str]:
    """Names of all modules, and of their classes and functions, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", ["dictionary", "portable", "interop.saelens", "interop.other_libraries"])
def test_dictionary_import_and_export_do_not_import_lightning(module):
    root, seen, waiting = (
        Path(deeplens_lightning.__file__).parents[1],
        set(),
        [f"deeplens_lightning.sae.{module}"],
    )
    while waiting:
        name = waiting.pop()
        file = root / (name.replace(".", "/") + ".py")
        if name not in seen and file.is_file():
            waiting += imported(file)
        seen.add(name)
    assert {
        "deeplens_lightning.types",
        "torchmetrics",
    } <= seen  # modules without further imports were reached
    assert not [name for name in seen if name.split(".")[0] in ("lightning", "pytorch_lightning")]


@pytest.mark.parametrize(
    "arguments",
    [
        {"d_in": D, "d_sae": 64, "k": 4, "architecture": "matryoshka", "optimization": {"warmup": 0.2}},
        {"d_in": {"a": D, "b": 8}, "k": 4, "input_hook": "a", "output_hook": "b", "skip": True},
    ],
)
def test_a_dictionary_and_a_sparse_autoencoder_have_the_same_settings_and_state(arguments):
    plain, trained = Dictionary(**arguments), SparseAutoencoder(**arguments)
    assert plain.settings == trained.settings == dict(trained.hparams)
    assert list(plain.state_dict()) == list(trained.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in trained.named_parameters()]
    again = Dictionary(**plain.settings)
    assert again.settings == plain.settings
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_help_documents_every_argument_of_a_sparse_autoencoder():
    assert inspect.signature(SparseAutoencoder) == inspect.signature(Dictionary)
    documented = inspect.getdoc(SparseAutoencoder.__init__)
    for name in inspect.signature(SparseAutoencoder).parameters:
        assert f"\n    {name}: " in documented


def test_an_import_builds_the_class_that_it_is_called_on(tmp_path):
    class Mine(SparseAutoencoder):
        pass

    folder = SparseAutoencoder(D, 64, k=4).export_saelens(tmp_path / "sae")
    assert type(Mine.from_saelens(folder)) is Mine
    assert type(saelens.from_saelens(Dictionary, folder)) is Dictionary


def test_one_sae_of_a_grid_is_exported_on_its_own(tmp_path):
    grid = SparseAutoencoderGrid(D, {"k": [2, 4]}, {"d_sae": 64})
    again = SparseAutoencoder.from_saelens(grid["k=4"].export_saelens(tmp_path / "sae"))
    assert again.activation.k == 4
    torch.testing.assert_close(again.W_dec, grid["k=4"].W_dec)


def test_a_grid_of_a_single_sae_trains(tmp_path):
    grid = SparseAutoencoderGrid(D, {"k": [4]}, {"d_sae": 64})
    trainer(tmp_path, max_steps=5).fit(grid, Rows(batches(5)))
    assert grid["k=4"].activity.tokens_seen == 5 * 64


@pytest.mark.parametrize("name", [None, "gpt2"])
def test_only_a_models_name_is_recorded_as_what_an_sae_was_trained_on(tmp_path, name):
    class Named(Rows):
        hf_model = torch.nn.Linear(1, 1) if name is None else name
        hook_names = ("layers.1.mlp_out",)

    sae = SparseAutoencoder(D, 64, k=4)
    trainer(tmp_path, max_steps=1).fit(sae, Named(batches(1)))
    known = {} if name is None else {"model_name": name}
    assert sae.trained_on == known | {"hook_name": "layers.1.mlp_out"}
