"""An imported SAE that is trained further keeps its function at first, gets units and gets better, not worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae import SparseAutoencoder
from tests.sae.test_interop import D_IN, D_SAE, K, raw_rows, relative_error, trained, weights
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

SCALING = Scaling(torch.full((D_IN,), 2.0), torch.full((D_IN,), 0.3))


def of_saelens(folder: Path, architecture: str, normalize: str = "mean_norm", **settings: Any) -> Any:
    d_in: Any = {"input": D_IN, "output": 10} if settings else D_IN
    exported = trained(architecture, normalize, d_in, **settings)
    return SparseAutoencoder.from_saelens(exported.export_saelens(folder / "sae"))


def of_sparsify(folder: Path, *, transcode: bool) -> SparseAutoencoder:
    state = {"encoder.weight": weights(D_SAE, D_IN), "encoder.bias": weights(D_SAE, seed=2)}
    state |= {"W_dec": weights(D_SAE, D_IN, seed=1), "b_dec": weights(D_IN, seed=3)}
    state |= {"W_skip": weights(D_IN, D_IN, seed=4)} if transcode else {}
    save_file(state, folder / "sae.safetensors")
    config = {"d_in": D_IN, "num_latents": D_SAE, "k": K, "transcode": transcode}
    (folder / "cfg.json").write_text(json.dumps(config))
    return SparseAutoencoder.from_sparsify(folder)


def of_dictionary_learning(folder: Path) -> SparseAutoencoder:
    state = {"W_enc": weights(D_IN, D_SAE), "b_enc": weights(D_SAE, seed=2)}
    state |= {"W_dec": weights(D_SAE, D_IN, seed=1), "b_dec": weights(D_IN, seed=3)}
    torch.save(state | {"threshold": torch.full((D_SAE,), 0.7)}, folder / "ae.pt")
    config = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": D_SAE}
    (folder / "config.json").write_text(json.dumps({"trainer": config}))
    return SparseAutoencoder.from_dictionary_learning(folder)


def of_deeplens(*, norm: bool) -> SparseAutoencoder:
    encoder, decoder = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN, bias=False)
    state = {f"encoder.{name}": p for name, p in encoder.state_dict().items()}
    state |= {"decoder.weight": decoder.weight.detach()}
    state |= {"norm.weight": 1 + weights(D_IN), "norm.bias": weights(D_IN, seed=1)} if norm else {}
    return SparseAutoencoder.from_deeplens(state)


SKIP = {"input_hook": "input", "output_hook": "output", "skip": True}
IMPORTS: dict[str, Callable[[Path], SparseAutoencoder]] = {
    "saelens topk": lambda folder: of_saelens(folder, "topk"),
    "saelens batch_topk": lambda folder: of_saelens(folder, "batch_topk", "zscore"),
    "saelens relu": lambda folder: of_saelens(folder, "relu"),
    "saelens jumprelu": lambda folder: of_saelens(folder, "jumprelu"),
    "saelens gated": lambda folder: of_saelens(folder, "gated"),
    "saelens transcoder": lambda folder: of_saelens(folder, "jumprelu", **SKIP),
    "sparsify": lambda folder: of_sparsify(folder, transcode=False),
    "sparsify transcoder": lambda folder: of_sparsify(folder, transcode=True),
    "dictionary_learning": of_dictionary_learning,
    "deeplens": lambda folder: of_deeplens(norm=False),
    "deeplens with norm": lambda folder: of_deeplens(norm=True),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_the_first_batch_sets_the_units_of_an_import_and_not_its_function(name: str, tmp_path: Path) -> None:
    sae = IMPORTS[name](tmp_path)
    x: Any = raw_rows()
    served: Any = SCALING.apply(x)
    scaling: Any = SCALING
    if isinstance(sae.d_in, dict):
        x = {hook: raw_rows(d=d, seed=i) for i, (hook, d) in enumerate(sae.d_in.items())}
        scaling = {
            hook: Scaling(torch.full((d,), 2.0), torch.full((d,), 0.3)) for hook, d in sae.d_in.items()
        }
        served = {hook: scaling[hook].apply(rows) for hook, rows in x.items()}
    with torch.no_grad():
        before, latents = sae(x), sae.encode(x)
        sae.prepare(scaling)
        sae.initialize_from(served)
        assert relative_error(sae(x), before) < 1e-5
        after = sae.encode(x)
        factor = (after[latents > 0] / latents[latents > 0]).median()
    torch.testing.assert_close(after / factor, latents, rtol=1e-3, atol=1e-4)
    for rows, units in zip(sae.rows(served), (sae.read, sae.write), strict=True):
        if not units.layer_norm:  # those rows are standardised
            assert 0.9 < float((rows - rows.mean(0)).norm(dim=1).square().mean().sqrt()) < 1.1
    assert float(sae.W_dec.detach().norm(dim=1).square().mean().sqrt()) == pytest.approx(1, abs=1e-4)
    state = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.prepare(scaling)
    sae.initialize_from(served)
    assert all(torch.equal(value, state[key]) for key, value in sae.state_dict().items())


TRUE = 20 * dictionary(64, 32)


def batches(count: int, offset: int = 0) -> list[Tensor]:
    return [codes(256, 64, 3, seed=offset + i) @ TRUE + 5 for i in range(count)]


def fvu(sae: SparseAutoencoder) -> float:
    x = torch.cat(batches(4, offset=10_000))
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of SAELens with trained SAEs of rows whose unit is about 35."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            where = tmp_path_factory.mktemp(architecture)
            sae = SparseAutoencoder(32, 128, k=4, architecture=architecture, lr=2e-3)
            trainer(where, max_steps=300).fit(sae, Rows(batches(300)))
            made[architecture] = sae.export_saelens(where / "sae")
        return made[architecture]

    return folder


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_an_import_that_is_trained_further_does_not_get_worse(
    architecture: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    sae = SparseAutoencoder.from_saelens(exported(architecture))
    before = fvu(sae)
    assert before < 0.5
    trainer(tmp_path, max_steps=60).fit(sae, Rows(batches(60, offset=500)))
    assert fvu(sae) < before + 0.02
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128), rtol=0, atol=1e-6)


def continued(folder: Path, exported: Path, *callbacks: Any, path: str | None = None) -> SparseAutoencoder:
    sae = SparseAutoencoder.from_saelens(exported)
    trainer(folder, None, callbacks, max_steps=8).fit(sae, Rows(batches(8)), ckpt_path=path)
    return sae


def test_a_resume_of_a_continued_import_equals_a_run_that_never_stopped(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = continued(tmp_path, exported("topk"), keep)
    again = continued(tmp_path, exported("topk"), path=str(tmp_path / "kept" / "step=3.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_resume_of_an_import_that_was_trained_in_units_of_1_keeps_them(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """As earlier releases trained it: the moments of the optimizer belong to these units."""
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    continued(tmp_path, exported("topk"), keep)
    path = tmp_path / "kept" / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for side in ("read", "write"):
        checkpoint["state_dict"][f"{side}.unit"].fill_(1)
    torch.save(checkpoint, path)
    again = continued(tmp_path, exported("topk"), path=str(path))
    assert (again.read.unit == 1).all()
    assert (again.write.unit == 1).all()


def test_an_average_that_has_not_begun_follows_an_import_to_its_units(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    average = EMAWeightAveraging(decay=0.9, update_starting_at_step=100)
    sae = continued(tmp_path, exported("batch_topk"), average)  # its end replaces the weights by the average
    assert sae.write.is_measured
    assert fvu(sae) == pytest.approx(fvu(SparseAutoencoder.from_saelens(exported("batch_topk"))), rel=1e-3)
