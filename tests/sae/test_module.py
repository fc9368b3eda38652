"""Training with Lightning: metrics, resuming, counters, units, error messages, YAML and precision."""

import textwrap

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from deeplens_lightning.normalization import Moments, Scaling
from deeplens_lightning.sae import Optimization, SparseAutoencoder
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D, N = 16, 24
TRUE = dictionary(N, D)
EVERY = ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"]


def batches(n: int, rows: int = 64, offset: int = 0) -> list[torch.Tensor]:
    return [codes(rows, N, 2, seed=offset + i) @ TRUE + 0.5 for i in range(n)]


def small(**settings) -> SparseAutoencoder:
    return SparseAutoencoder(**{"d_in": D, "d_sae": 128, "k": 4, "lr": 3e-3, **settings})


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_learns_logs_and_holds_the_decoder_at_unit_norm(tmp_path):
    sae, fit = small(), trainer(tmp_path, max_steps=150, log_every_n_steps=10)
    fit.fit(sae, Rows(batches(150), batches(4, offset=1000)))
    metrics = fit.callback_metrics
    assert {"train/loss", "train/fvu", "train/l0", "train/dead_fraction"} <= metrics.keys()
    assert {
        "val/fvu",
        "val/cosine",
        "val/l0",
        "val/dead_fraction",
        "val/shrinkage",
        "val/rows",
    } <= metrics.keys()
    assert metrics["val/fvu"] < 0.4
    assert metrics["val/rows"] == 256
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128))


def test_held_out_metrics_equal_a_direct_computation_over_all_rows(tmp_path):
    sae, val = small(), batches(3, rows=50, offset=7)
    fit = trainer(tmp_path, max_steps=30)
    fit.fit(sae, Rows(batches(30), val))
    x = torch.cat(val)
    with torch.no_grad():
        z, x_hat = sae.encode(x), sae(x)
    metrics = fit.callback_metrics
    fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    torch.testing.assert_close(metrics["val/fvu"], fvu, rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["val/l0"], (z > 0).sum(1).float().mean())
    torch.testing.assert_close(metrics["val/dead_fraction"], 1 - (z > 0).any(0).float().mean())


@pytest.mark.parametrize("architecture", EVERY)
def test_resuming_equals_never_having_stopped(tmp_path, architecture):
    data = batches(24)
    whole = small(architecture=architecture, dead_after_tokens=200)
    trainer(tmp_path, max_steps=24).fit(whole, Rows(data))
    saver = ModelCheckpoint(tmp_path, "stop", every_n_train_steps=11, save_top_k=-1)
    first = small(architecture=architecture, dead_after_tokens=200)
    callbacks = {"enable_checkpointing": True, "callbacks": [saver]}
    trainer(tmp_path, max_steps=24, **callbacks).fit(first, Rows(data))
    assert_equal_states(state(whole), state(first))
    resumed = small(architecture=architecture, dead_after_tokens=200, seed=5)
    trainer(tmp_path, max_steps=24, **callbacks).fit(resumed, Rows(data), ckpt_path=tmp_path / "stop.ckpt")
    assert_equal_states(state(whole), state(resumed))


@pytest.mark.parametrize("architecture", EVERY)
def test_every_architecture_is_saved_and_loaded_bit_for_bit(tmp_path, architecture):
    raw = batches(12)
    sae, fit = small(architecture=architecture), trainer(tmp_path, max_steps=12)
    fit.fit(sae, Rows(raw))
    fit.save_checkpoint(tmp_path / "sae.ckpt")
    again = SparseAutoencoder.load_from_checkpoint(tmp_path / "sae.ckpt", weights_only=True)
    assert_equal_states(state(again), state(sae))
    assert again.hparams == sae.hparams
    with torch.no_grad():
        assert torch.equal(again.encode(raw[0]), sae.encode(raw[0]))
        assert torch.equal(again(raw[0]), sae(raw[0]))


def test_a_checkpoint_is_self_contained_and_loads_with_weights_only(tmp_path):
    scaling = Scaling(torch.full((D,), 0.4), torch.linspace(0.5, 2, D))
    raw = batches(40)
    sae, fit = small(optimization=Optimization(warmup=0.1)), trainer(tmp_path, max_steps=40)
    fit.fit(sae, Rows([scaling.apply(x) for x in raw], scaling=scaling))
    fit.save_checkpoint(tmp_path / "sae.ckpt")
    again = SparseAutoencoder.load_from_checkpoint(tmp_path / "sae.ckpt", weights_only=True)
    assert again.optimization == Optimization(warmup=0.1)
    x = raw[0]
    with torch.no_grad():
        torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
        torch.testing.assert_close(sae.encode(x), sae.encode_served(scaling.apply(x)), rtol=1e-4, atol=1e-5)
        assert ((again(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() < 0.9
        torch.testing.assert_close(again.decode(again.encode(x)), again(x))


@pytest.mark.parametrize("normalize", ["mean_norm", "standardize", "zscore"])
def test_normalised_batches_train_a_dictionary_of_raw_activations(tmp_path, normalize):
    moments = Moments(D)
    raw = [30 * x + 100 for x in batches(200)]
    for x in raw:
        moments.update(x)
    scaling = moments.scaling(normalize)
    sae, fit = small(), trainer(tmp_path, max_steps=200)
    fit.fit(sae, Rows([scaling.apply(x) for x in raw], scaling=scaling))
    x = raw[0]
    with torch.no_grad():
        assert ((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() < 0.4


def test_a_seed_gives_the_same_dictionary_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = small(seed=3), small(seed=3), small(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert_equal_states(state(a), state(b))
    assert not torch.equal(a.W_dec, c.W_dec)


def test_dead_latents_are_counted_in_tokens(tmp_path):
    sae = small(dead_after_tokens=64 * 5)
    trainer(tmp_path, max_steps=5, log_every_n_steps=1).fit(sae, Rows(batches(5)))
    never = sae.activity.silent_tokens == 5 * 64
    assert sae.activity.dead_fraction(sae.dead_after_tokens) == never.float().mean()
    assert sae.activity.tokens_seen == 5 * 64


def test_dead_means_a_tenth_of_the_planned_tokens_unless_said_otherwise(tmp_path):
    sae = small()
    assert sae.dead_after_tokens == 10_000_000
    trainer(tmp_path, max_steps=20, accumulate_grad_batches=2, max_epochs=1).fit(sae, Rows(batches(40)))
    assert sae.dead_after_tokens == 20 * 2 * 64 // 10


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_rows_give_finite_losses_and_metrics(tmp_path, architecture, value):
    data = [torch.full((32, D), value) for _ in range(3)]
    sae, fit = small(architecture=architecture), trainer(tmp_path, max_steps=3, log_every_n_steps=1)
    fit.fit(sae, Rows(data, data))
    assert all(torch.isfinite(v) for v in fit.callback_metrics.values()), fit.callback_metrics
    assert all(p.isfinite().all() for p in sae.parameters())


def spoiled() -> list[torch.Tensor]:
    data = batches(6)
    data[2] = data[2].clone()
    data[2][7, 3] = torch.nan
    data[2][9, 0] = torch.inf
    return data


def test_nan_rows_stop_training_naming_step_and_row(tmp_path):
    with pytest.raises(
        ValueError, match=r"2 of 64 rows hold NaN or infinity \(step 2, first is row 7.*on_nonfinite='skip'"
    ):
        trainer(tmp_path, max_steps=6).fit(small(), Rows(spoiled()))


def test_nan_rows_are_skipped_and_counted_by_choice(tmp_path):
    sae, fit = small(on_nonfinite="skip"), trainer(tmp_path, max_steps=6, log_every_n_steps=1)
    fit.fit(sae, Rows(spoiled()))
    assert fit.callback_metrics["train/nonfinite_rows"] == 2
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 200}, r"k=200 latents of 128 .* d_sae=128"),
        ({"architecture": "batchtpk"}, "did you mean 'batch_topk'"),
        (
            {"architecture": {"name": "jumprelu", "bandwith": 1.0}},
            "no setting 'bandwith'; did you mean 'bandwidth'",
        ),
        ({"architecture": {"name": "topk", "prefixes": [64, 32]}}, "must increase"),
        ({"architecture": "relu", "kernel": "sparse"}, "needs a top-k architecture"),
        ({"input_hook": "a"}, "needs d_in by hook point"),
        ({"d_in": {"a": 4, "b": 4}, "input_hook": "c"}, "not served; the data has a, b"),
        ({"skip": True}, "learn the identity"),
        ({"d_sae": 0}, "must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("settings", "name"), [({"d_sae": 64}, "d_sae"), ({"architecture": "relu"}, "architecture")]
)
def test_a_checkpoint_of_another_dictionary_is_refused_naming_the_difference(tmp_path, settings, name):
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(small(), Rows(batches(1)))
    fit.save_checkpoint(tmp_path / "sae.ckpt")
    with pytest.raises(ValueError, match=f"the checkpoint holds an SAE with {name}="):
        trainer(tmp_path, max_steps=2).fit(
            small(**settings), Rows(batches(2)), ckpt_path=tmp_path / "sae.ckpt"
        )


def test_steps_that_log_nothing_do_not_log(tmp_path):
    """Other steps copy nothing from the device, and so do not wait for it."""
    calls = []

    class Spy(SparseAutoencoder):
        def scalars(self, step):
            calls.append(self.global_step)
            return super().scalars(step)

    trainer(tmp_path, max_steps=20, log_every_n_steps=8).fit(Spy(D, 128, k=4), Rows(batches(20)))
    assert calls == [7, 15]


def from_yaml(tmp_path, monkeypatch, name: str, arguments: str) -> L.LightningModule:
    monkeypatch.setattr("sys.argv", ["fit"])
    lines = textwrap.indent(textwrap.dedent(arguments), "    ")
    config = f"model:\n  class_path: deeplens_lightning.sae.{name}\n  init_args:\n{lines}"
    (tmp_path / "c.yaml").write_text(config)
    args = ["--config", str(tmp_path / "c.yaml")]
    cli = LightningCLI(
        L.LightningModule, subclass_mode_model=True, run=False, args=args, save_config_callback=None
    )
    return cli.model


def test_yaml_in_subclass_mode_builds_an_sae(tmp_path, monkeypatch):
    sae = from_yaml(
        tmp_path,
        monkeypatch,
        "SparseAutoencoder",
        """
        d_in: 16
        d_sae: 64
        k: 4
        architecture: {name: jumprelu, penalty: tanh}
        optimization: {warmup: 0.2, clip_norm: null}
        """,
    )
    assert sae.activation.kind == "tanh"
    assert sae.optimization == Optimization(warmup=0.2, clip_norm=None)


def test_yaml_builds_transcoders_and_sweeps(tmp_path, monkeypatch):
    transcoder = from_yaml(
        tmp_path,
        monkeypatch,
        "SparseAutoencoder",
        """
        d_in: {layers.1.mlp_in: 8, layers.1.mlp_out: 6}
        expansion_factor: 4
        k: 4
        input_hook: layers.1.mlp_in
        output_hook: layers.1.mlp_out
        skip: true
        """,
    )
    assert (transcoder.d_sae, transcoder.W_dec.shape, transcoder.W_skip.shape) == (32, (32, 6), (6, 8))
    grid = from_yaml(
        tmp_path,
        monkeypatch,
        "SparseAutoencoderGrid",
        """
        d_in: 8
        sweep: {k: [2, 4], lr: [0.001]}
        shared: {d_sae: 32, optimization: {warmup: 0.2}}
        """,
    )
    assert grid.names == ["k=2,lr=0.001", "k=4,lr=0.001"]
    assert grid.saes[0].optimization.warmup == 0.2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "gated"])
def test_low_precision_trains(tmp_path, precision, architecture):
    sae, fit = small(architecture=architecture), trainer(tmp_path, max_steps=60, precision=precision)
    fit.fit(sae, Rows(batches(60), batches(2, offset=99)))
    assert fit.callback_metrics["val/fvu"] < 0.9


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_a_compiled_step_is_the_plain_one(architecture):
    (x,) = batches(1)
    found = []
    for compiled in (False, True):
        sae = small(architecture=architecture, compile_step=compiled)
        sae.prepare(None)
        sae.initialize_from(x)
        step = sae.step(x)
        step.loss.backward()
        found.append((step.loss.detach(), sae.W_enc.grad, sae.W_dec.grad))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)
