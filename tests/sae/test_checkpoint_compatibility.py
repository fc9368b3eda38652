"""Checkpoints hold what their SAEs are and were trained on; other names or settings are refused, or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning.sae import Dictionary, Optimization, SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.training import DictionaryTraining
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D = 16
SHARED: dict[str, Any] = {"d_sae": 64, "lr": 3e-3}


def batches(n: int) -> list[torch.Tensor]:
    return [codes(32, 24, 2, seed=i) @ dictionary(24, D) for i in range(n)]


class Named(Rows):
    """Rows of a language model and a hook point that have names."""

    hf_model = "gpt2"
    hook_names = ("layers.1.mlp_out",)


def grid(sweep: Any = None, **shared: Any) -> SparseAutoencoderGrid:
    return SparseAutoencoderGrid(D, {"k": [2, 4, 8]} if sweep is None else sweep, {**SHARED, **shared})


def one(**settings: Any) -> SparseAutoencoder:
    return SparseAutoencoder(**{"d_in": D, "k": 4, **SHARED, **settings})


def saved(module: DictionaryTraining, folder: Path) -> Path:
    """The checkpoint of a module after two steps."""
    fit = trainer(folder, max_steps=2)
    fit.fit(module, Named(batches(2)))
    fit.save_checkpoint(folder / "two.ckpt")
    return folder / "two.ckpt"


def of_an_earlier_release(path: Path) -> Path:
    """The same checkpoint of a grid without the entries that earlier releases did not write."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sae_settings"], checkpoint["trained_on"]
    torch.save(checkpoint, path)
    return path


def resume(module: DictionaryTraining, path: Path, verb: str = "fit") -> None:
    """Train two more steps, or measure, from a checkpoint."""
    run = trainer(path.parent, max_steps=4)
    if verb == "fit":
        run.fit(module, Named(batches(4)), ckpt_path=path)
    else:
        run.validate(module, Named([], batches(1)), ckpt_path=path, verbose=False)


def assert_equal_weights(a: Dictionary, b: Dictionary) -> None:
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


# ---- a grid by name


OF_ANOTHER_ORDER = (
    "holds the SAEs k=2, k=4, k=8, this grid has k=8, k=4, k=2: give the sweep of the checkpoint, in its order, or load "
    r"one of them with SparseAutoencoder.load_from_checkpoint\(path, name='k=2'\)"
)


@pytest.mark.parametrize(("verb", "earlier"), [("fit", False), ("validate", True)])
@pytest.mark.parametrize(
    ("sweep", "shared", "message"),
    [
        ({"k": [8, 4, 2]}, {}, OF_ANOTHER_ORDER),
        (
            None,
            {"layer_norm": True},
            "the SAE 'k=2' with layer_norm=False, this one has True: set layer_norm=",
        ),
        (None, {"architecture": "relu"}, r"the SAE 'k=2' with architecture=\{'name': 'topk'\}, this one has"),
        ([{"k": 2}, {"k": 4}, {"k": 8, "skip": None}], {}, "holds the SAEs k=2, k=4, k=8, this grid has"),
    ],
    ids=["order", "layer_norm", "architecture", "names"],
)
def test_a_grid_takes_a_checkpoint_of_the_same_names_and_settings_only(
    sweep: Any, shared: dict[str, Any], message: str, earlier: bool, verb: str, tmp_path: Path
) -> None:
    path = saved(grid(), tmp_path)
    if earlier:
        of_an_earlier_release(path)
    resume(grid(), path, verb)
    with pytest.raises(ValueError, match=message):
        resume(grid(sweep, **shared), path, verb)


def test_a_sweep_given_while_loading_is_checked_too(tmp_path: Path) -> None:
    path = saved(grid(), tmp_path)
    with pytest.raises(ValueError, match="holds the SAEs k=2, k=4, k=8, this grid has k=8, k=4, k=2"):
        SparseAutoencoderGrid.load_from_checkpoint(path, sweep={"k": [8, 4, 2]})
    with pytest.raises(ValueError, match="'k=2' with layer_norm=False, this one has True"):
        SparseAutoencoderGrid.load_from_checkpoint(path, shared={**SHARED, "layer_norm": True})


@pytest.mark.parametrize("earlier", [False, True])
def test_any_sae_of_a_grid_is_loaded_by_its_name_and_trains_on(earlier: bool, tmp_path: Path) -> None:
    trained = grid([{"k": 2}, {"k": 4, "architecture": "batch_topk"}, {"architecture": "gated", "d_sae": 32}])
    path = saved(trained, tmp_path)
    if earlier:
        of_an_earlier_release(path)
    for name in trained.names:
        alone = SparseAutoencoder.load_from_checkpoint(path, name=name)
        assert_equal_weights(alone, trained[name])
        assert alone.settings == trained[name].settings == dict(alone.hparams)
        assert alone.trained_on == ({} if earlier else trained[name].trained_on)
        fit = trainer(tmp_path, max_steps=2)
        fit.fit(alone, Rows(batches(2)))
        assert alone.activity.tokens_seen == 4 * 32


def test_what_a_grid_was_trained_on_is_in_its_checkpoint_and_in_exports(tmp_path: Path) -> None:
    path = saved(grid(), tmp_path)
    known = {"model_name": "gpt2", "hook_name": "layers.1.mlp_out"}
    again = SparseAutoencoderGrid.load_from_checkpoint(path)
    assert [sae.trained_on for sae in again.dictionaries.values()] == 3 * [known]
    for folder in again.export_saelens(tmp_path / "lens"):
        assert known.items() <= json.loads((folder / "cfg.json").read_text())["metadata"].items()
    for folder in again.export_safetensors(tmp_path / "ours"):
        assert json.loads((folder / "config.json").read_text())["trained_on"] == known
    alone = SparseAutoencoder.load_from_checkpoint(path, name="k=4")
    folder = alone.export_safetensors(tmp_path / "one")
    assert SparseAutoencoder.from_safetensors(folder).trained_on == known


def test_saes_of_several_hook_points_keep_their_own(tmp_path: Path) -> None:
    class Two(Rows):
        hf_model = "gpt2"
        hook_names = ("a", "b")

    both = SparseAutoencoderGrid({"a": D, "b": D}, {"input_hook": ["a", "b"]}, {"d_sae": 32, "k": 2})
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(both, Two([{"a": x, "b": x} for x in batches(1)]))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    for hook in ("a", "b"):
        sae = SparseAutoencoder.load_from_checkpoint(tmp_path / "two.ckpt", name=f"input_hook={hook}")
        assert sae.trained_on["hook_name"] == hook
        assert sae.encode({"a": torch.ones(1, D), "b": torch.ones(1, D)}).shape == (1, 32)


def test_errors_say_which_saes_a_checkpoint_holds(tmp_path: Path) -> None:
    path = saved(grid(), tmp_path)
    message = (
        r"holds a grid of the SAEs k=2, k=4, k=8: load one of them with "
        r"SparseAutoencoder.load_from_checkpoint\(path, name='k=2'\), or all of them with "
        r"SparseAutoencoderGrid.load_from_checkpoint\(path\)"
    )
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        resume(one(), path)
    with pytest.raises(
        ValueError, match=r"has no SAE '4': did you mean 'k=4'\? its SAEs are 'k=2', 'k=4', 'k=8'"
    ):
        SparseAutoencoder.load_from_checkpoint(path, name="4")
    single = saved(one(), tmp_path / "one")
    with pytest.raises(ValueError, match="holds a single SAE, which has no name: leave out name='k=4'"):
        SparseAutoencoder.load_from_checkpoint(single, name="k=4")
    with pytest.raises(ValueError, match="holds a single SAE, this grid has k=2, k=4, k=8: use SparseAuto"):
        resume(grid(), single)
    with pytest.raises(FileNotFoundError):
        SparseAutoencoder.load_from_checkpoint(tmp_path / "no.ckpt", name="k=4")


def test_loading_on_an_instance_is_refused(tmp_path: Path) -> None:
    path, sae = saved(one(), tmp_path), one()
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        sae.load_from_checkpoint(path)


def test_a_grid_with_settings_of_adam_as_an_object_is_loaded_with_weights_only(tmp_path: Path) -> None:
    given = Optimization(warmup=0.5, clip_norm=None)
    path = saved(grid({"optimization": [given, Optimization()], "k": [2]}), tmp_path)
    again = SparseAutoencoderGrid.load_from_checkpoint(path, weights_only=True)
    assert [sae.optimization for sae in again.dictionaries.values()] == [given, Optimization()]
    resume(grid({"optimization": [given, Optimization()], "k": [2]}), path)


# ---- resuming with other settings

OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 2}, "with k=4, this one has 2: set k=4, or for a new run"),
    "warmup": (
        {"optimization": {"warmup": 0.5}},
        "with optimization.warmup=0.05, this one has 0.5: set optimization.warmup=0.05, or for a new run",
    ),
    "betas": (
        {"optimization": Optimization(betas=(0.0, 0.999))},
        r"with optimization.betas=\[0.9, 0.999\], this one has \[0.0, 0.999\]",
    ),
    "eps": ({"optimization": {"eps": 1e-6}}, "with optimization.eps=6.25e-10, this one has 1e-06"),
    "dead": ({"dead_after_tokens": 9}, "with dead_after_tokens=None, this one has 9"),
    "aux_k": (
        {"architecture": {"name": "topk", "aux_k": 3}},
        "with architecture={'name': 'topk'}, this one has {'name': 'topk', 'aux_k': 3}",
    ),
}


@pytest.mark.parametrize(("change", "several"), [*((change, False) for change in OTHER), ("warmup", True)])
def test_a_resume_with_other_settings_of_training_is_refused(
    change: str, several: bool, tmp_path: Path
) -> None:
    settings, message = OTHER[change]

    def make(**changes: Any) -> DictionaryTraining:
        return grid({"seed": [0, 1]}, **{"k": 4, **changes}) if several else one(**changes)

    path = saved(make(), tmp_path)
    with pytest.raises(ValueError, match=message):
        resume(make(**settings), path)


@pytest.mark.parametrize("several", [False, True])
def test_a_resume_with_another_rate_says_that_it_is_not_used(several: bool, tmp_path: Path) -> None:
    make = grid if several else one
    path = saved(make(), tmp_path)
    again = make(lr=0.1)
    with pytest.warns(UserWarning, match=r"lr=0\.1 is not used: the fit continues with lr=0\.003 of the"):
        resume(again, path)
    assert all(sae.lr == 3e-3 for sae in again.dictionaries.values())


def test_settings_that_do_not_change_the_course_of_training_may_differ_in_a_resume(tmp_path: Path) -> None:
    path = saved(one(), tmp_path)
    resume(one(seed=7, kernel="dense", on_nonfinite="skip"), path)


def test_figures_are_not_measured_with_another_k(tmp_path: Path) -> None:
    path = saved(one(), tmp_path)
    with pytest.raises(ValueError, match="with k=4, this one has 2: set k=4, or for a new run with its weig"):
        resume(one(k=2), path, "validate")
    resume(one(optimization={"warmup": 0.5}, dead_after_tokens=9), path, "validate")


def test_a_new_run_begins_with_the_weights_of_a_checkpoint_and_other_settings(tmp_path: Path) -> None:
    trained = one()
    path = saved(trained, tmp_path)
    sae = SparseAutoencoder.load_from_checkpoint(path, k=2, optimization={"warmup": 0.5}, lr=1e-4)
    assert_equal_weights(sae, trained)
    assert (sae.activation.k, sae.optimization.warmup, sae.lr) == (2, 0.5, 1e-4)
    trainer(tmp_path, max_steps=1).fit(sae, Rows(batches(1)))
    with pytest.raises(
        ValueError, match="with layer_norm=False, this one has True: set layer_norm=False, or"
    ):
        SparseAutoencoder.load_from_checkpoint(path, layer_norm=True)


def test_the_same_settings_in_other_forms_are_the_same(tmp_path: Path) -> None:
    path = saved(
        one(architecture={"name": "topk", "prefixes": (0.5, 1.0)}, optimization=Optimization()), tmp_path
    )
    same = {"betas": [0.9, 0.999], "warmup": 0.05}
    resume(one(architecture={"name": "TopK", "prefixes": [0.5, 1.0]}, optimization=same), path)


def test_a_fit_saved_inside_and_resumed_is_not_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "stop", every_n_train_steps=3)
    trainer(tmp_path, None, [saver], max_steps=5).fit(grid(), Named(batches(5)))
    again = grid()
    run = trainer(tmp_path, None, [saver], max_steps=5)
    run.fit(again, Named(batches(5)), ckpt_path=tmp_path / "stop.ckpt")
    whole = grid()
    trainer(tmp_path, max_steps=5).fit(whole, Named(batches(5)))
    for name in whole.names:
        assert_equal_weights(again[name], whole[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_settings": 5}, "the checkpoint.sae_settings is 5, expected an object"),
        ({"sae_settings": {"k=2": [1]}}, r"sae_settings.k=2 is \[1\], expected an object"),
        ({"trained_on": {"k=2": 5}}, "trained_on.k=2 is 5, expected an object"),
        ({"sae_settings": None, "hyper_parameters": {"sweep": 5, "d_in": D}}, "sweep is 5, expected a"),
    ],
)
def test_a_damaged_description_of_a_grid_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = torch.load(saved(grid(), tmp_path), weights_only=True) | changes
    kept = {name: value for name, value in checkpoint.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        grid().on_load_checkpoint(kept)
