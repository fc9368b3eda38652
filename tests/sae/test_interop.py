"""Imported and exported dictionaries compute what they compute in the other library."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deeplens_lightning.normalization import Moments
from deeplens_lightning.sae import SparseAutoencoder

D_IN, D_SAE, K = 16, 96, 5
ARCHITECTURES = ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"]
NORMALIZATIONS = ["none", "mean_norm", "center", "standardize", "zscore"]


def raw_rows(n: int = 200, d: int = D_IN, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.rand(d, generator=g).mul(5) + 3 * torch.randn(
        d, generator=g
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    norms = b.norm(dim=1)
    return float(((a - b).norm(dim=1) / norms.clamp(min=1e-3 * norms.median())).max())


def trained(architecture: str, normalize: str, d_in=D_IN, **settings) -> SparseAutoencoder:
    """An SAE with all state that training changes: normalisation, units, biases, thresholds."""
    sae = SparseAutoencoder(d_in, D_SAE, k=K, architecture=architecture, **settings)
    widths = d_in if isinstance(d_in, dict) else {"": d_in}
    batch, scaling = {}, {}
    for i, (name, width) in enumerate(widths.items()):
        moments = Moments(width)
        moments.update(raw_rows(d=width, seed=i))
        scaling[name] = moments.scaling(normalize)
        batch[name] = scaling[name].apply(raw_rows(d=width, seed=i))
    sae.prepare(scaling if isinstance(d_in, dict) else scaling[""])
    sae.initialize_from(batch if isinstance(d_in, dict) else batch[""])
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
        if architecture == "jumprelu":
            sae.activation.threshold.abs_()
        if architecture in ("batch_topk", "matryoshka"):
            sae.activation.threshold.fill_(0.2)
    return sae.eval()


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_reads_an_export_with_the_same_reconstruction_of_raw_rows(
    sae_lens, tmp_path, architecture, normalize
):
    sae = trained(architecture, normalize)
    theirs = sae_lens.SAE.load_from_disk(sae.export_saelens(tmp_path / "sae", metadata={"hook_name": "h"}))
    x = raw_rows(seed=9)
    with torch.no_grad():
        assert relative_error(theirs(x), sae(x)) < 1e-5
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "h"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_export_read_back_is_the_same_dictionary(tmp_path, architecture):
    sae = trained(architecture, "zscore")
    again = SparseAutoencoder.from_saelens(sae.export_saelens(tmp_path / "sae"))
    x = raw_rows(seed=9)
    with torch.no_grad():
        assert relative_error(again(x), sae(x)) < 1e-5
    assert again.hparams["architecture"]["unit_norm"] is False  # rows of W_dec are in raw units


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "batch_topk", "jumprelu"])
def test_saelens_reads_transcoders_and_they_come_back(sae_lens, tmp_path, architecture, skip):
    d_in = {"a": D_IN, "b": 10}
    sae = trained(architecture, "zscore", d_in, input_hook="a", output_hook="b", skip=skip)
    folder = sae.export_saelens(tmp_path / "sae")
    x = raw_rows(seed=9)
    with torch.no_grad():
        assert relative_error(sae_lens.SAE.load_from_disk(folder)(x), sae(x)) < 1e-5
        assert relative_error(SparseAutoencoder.from_saelens(folder)(x), sae(x)) < 1e-5


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("topk", {"k": K}),
        ("batchtopk", {"k": K}),
        ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [8, 32, D_SAE]}),
        ("jumprelu", {"jumprelu_init_threshold": 0.3}),
        ("gated", {}),
    ],
)
def test_an_sae_that_saelens_saved_reconstructs_the_same_here(
    sae_lens, tmp_path, architecture, settings, to_input
):
    from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": to_input,
        **settings,
    }
    theirs = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(config).to_dict())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name != "threshold":
                p.add_(0.2 * torch.randn(p.shape, generator=g))
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.4)
    theirs.save_inference_model(tmp_path / "sae")
    x = raw_rows(seed=9)
    with torch.no_grad():
        reread = sae_lens.SAE.load_from_disk(tmp_path / "sae")
        assert relative_error(SparseAutoencoder.from_saelens(tmp_path / "sae")(x), reread(x)) < 1e-5


def test_an_existing_export_folder_is_refused_and_replaced_on_demand(tmp_path):
    sae = trained("topk", "none")
    sae.export_saelens(tmp_path / "sae")
    with pytest.raises(FileExistsError, match=r"exists already.*overwrite=True"):
        sae.export_saelens(tmp_path / "sae")
    sae.export_saelens(tmp_path / "sae", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


def edit_config(folder, **changes) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saelens_config_with_an_unknown_field_is_refused_naming_it(tmp_path):
    folder = trained("topk", "none").export_saelens(tmp_path / "sae")
    edit_config(folder, secret_gain=2.0)
    with pytest.raises(ValueError, match=r"not known here: secret_gain.*ignore_fields=\['secret_gain'\]"):
        SparseAutoencoder.from_saelens(folder)
    assert SparseAutoencoder.from_saelens(folder, ignore_fields=["secret_gain"]).d_sae == D_SAE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "scales every row by itself"),
        ({"architecture": "matching_pursuit"}, "has no equal here"),
    ],
)
def test_an_sae_that_the_format_cannot_express_is_refused(tmp_path, change, message):
    folder = trained("topk", "none").export_saelens(tmp_path / "sae")
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_saelens(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json"):
        SparseAutoencoder.from_saelens(tmp_path)


def test_a_crosscoder_is_not_exported_to_saelens(tmp_path):
    with pytest.raises(ValueError, match="no crosscoders"):
        SparseAutoencoder({"a": 4, "b": 4}, 32, k=2).export_saelens(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def keep_top(z: Tensor, k: int) -> Tensor:
    return torch.where(z >= z.sort(dim=1, descending=True).values[:, k - 1 : k], z, 0)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning_checkpoints_reconstruct_as_their_formulas(tmp_path, kind):
    x, we, wd = raw_rows(), weights(D_SAE, D_IN), weights(D_IN, D_SAE, seed=1)
    be, bd = weights(D_SAE, seed=2), weights(D_IN, seed=3)
    linear = {"encoder.weight": we, "decoder.weight": wd}
    pre = (x - bd) @ we.T + be
    if kind == "AutoEncoder":
        state, z = {**linear, "encoder.bias": be, "bias": bd}, pre.relu()
    elif kind == "AutoEncoderTopK":
        state = {
            **linear,
            "encoder.bias": be,
            "b_dec": bd,
            "k": torch.tensor(K),
            "threshold": torch.tensor(-1.0),
        }
        z = keep_top(pre.relu(), K)
    elif kind == "BatchTopKSAE":
        state = {
            **linear,
            "encoder.bias": be,
            "b_dec": bd,
            "k": torch.tensor(K),
            "threshold": torch.tensor(1.0),
        }
        z = torch.where(pre > 1.0, pre, 0)
    elif kind == "MatryoshkaBatchTopKSAE":
        state = {"W_enc": we.T, "b_enc": be, "W_dec": wd.T, "b_dec": bd, "threshold": torch.tensor(1.0)}
        state |= {"k": torch.tensor(K), "group_sizes": torch.tensor([32, 64])}
        z = torch.where(pre > 1.0, pre, 0)
    elif kind == "JumpReluAutoEncoder":
        state = {
            "W_enc": we.T,
            "b_enc": be,
            "W_dec": wd.T,
            "b_dec": bd,
            "threshold": torch.full((D_SAE,), 0.7),
        }
        raw = x @ we.T + be
        z = torch.where(raw > 0.7, raw, 0)
    else:
        gain, mag = weights(D_SAE, seed=4), weights(D_SAE, seed=5)
        state = {**linear, "decoder_bias": bd, "r_mag": gain, "gate_bias": be, "mag_bias": mag}
        z = (pre > 0) * (((x - bd) @ we.T) * gain.exp() + mag).relu()
    torch.save(state, tmp_path / "ae.pt")
    config = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": config, "buffer": {}}))
    with torch.no_grad():
        ours = SparseAutoencoder.from_dictionary_learning(tmp_path)
        assert relative_error(ours(x), z @ wd.T + bd) < 1e-5


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_folders_reconstruct_as_their_formula(tmp_path, transcode):
    x, we, wd = raw_rows(), weights(D_SAE, D_IN), weights(D_SAE, D_IN, seed=1)
    be, bd, skip = weights(D_SAE, seed=2), weights(D_IN, seed=3), weights(D_IN, D_IN, seed=4)
    state = {"encoder.weight": we, "encoder.bias": be, "W_dec": wd, "b_dec": bd}
    save_file(state | ({"W_skip": skip} if transcode else {}), tmp_path / "sae.safetensors")
    config = {
        "d_in": D_IN,
        "num_latents": D_SAE,
        "k": K,
        "transcode": transcode,
        "skip_connection": transcode,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    z = keep_top(((x if transcode else x - bd) @ we.T + be).relu(), K)
    expected = z @ wd + bd + (x @ skip.T if transcode else 0)
    with torch.no_grad():
        assert relative_error(SparseAutoencoder.from_sparsify(tmp_path)(x), expected) < 1e-5


def test_signed_sparsify_dictionaries_are_refused(tmp_path):
    save_file({"W_dec": weights(4, 4)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 4, "k": 2, "signed": True}))
    with pytest.raises(ValueError, match="unsigned"):
        SparseAutoencoder.from_sparsify(tmp_path)


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_deeplens_weights_reconstruct_as_their_modules(tmp_path, norm, tied, k):
    x = raw_rows()
    layer_norm, encoder = nn.LayerNorm(D_IN), nn.Linear(D_IN, D_SAE)
    decoder = nn.Linear(D_SAE, D_IN, bias=False)
    with torch.no_grad():
        layer_norm.weight.copy_(1 + weights(D_IN))
        layer_norm.bias.copy_(weights(D_IN, seed=1))
        z = encoder(layer_norm(x) if norm else x).relu()
        z = z if k is None else keep_top(z, k)
        expected = z @ encoder.weight if tied else decoder(z)
    parts = (
        {"encoder": encoder} | ({"norm": layer_norm} if norm else {}) | ({} if tied else {"decoder": decoder})
    )
    state = {f"{a}.{b}": p for a, module in parts.items() for b, p in module.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "sae.pt")
    with torch.no_grad():
        assert relative_error(SparseAutoencoder.from_deeplens(tmp_path / "sae.pt", k=k)(x), expected) < 1e-5
