"""Every architecture's loss and gradients equal an independent dense float64 reference."""

import pytest
import torch
from torch import Tensor

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.forward import dense_pass, sparse_pass

D_IN, D_SAE, BATCH, K = 12, 64, 24, 3


def make(architecture, **settings) -> SparseAutoencoder:
    sae = SparseAutoencoder(
        D_IN, D_SAE, k=K, architecture=architecture, dead_after_tokens=100, **settings
    ).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():  # away from the symmetric start: biases, gains and thresholds in play
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=g, dtype=torch.float64))
        if sae.hparams["architecture"]["name"] == "jumprelu":
            sae.activation.threshold.abs_()
    return sae


def rows(seed: int = 0, width: int = D_IN) -> Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(pre: Tensor, architecture: str) -> Tensor:
    """The top-k mask, by sorting."""
    if architecture == "batch_topk":
        return pre >= pre.flatten().sort(descending=True).values[K * len(pre) - 1]
    return pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K]


def reference(
    sae: SparseAutoencoder, x: Tensor, architecture: str, widths=(D_SAE,), dead: Tensor | None = None
):
    """Loss by the papers' formulas on dense tensors, with plain autograd."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    we, be, wd, bd = (leaves[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    variance = ((x - x.mean(0)) ** 2).sum()
    pre = (x - bd) @ we.T + be
    penalty = 0.0
    if architecture == "relu":
        z = pre.relu()
        penalty = 0.1 * (z * wd.norm(dim=1)).sum(1).mean()
    elif architecture == "gated":
        gate = (pre > 0).double()
        z = (
            gate
            * (
                ((x - bd) @ we.T) * leaves["activation.log_gain"].exp() + leaves["activation.magnitude_bias"]
            ).relu()
        )
        via_gate = pre.relu() @ wd.detach() + bd.detach()
        penalty = 0.1 * pre.relu().sum(1).mean() + ((via_gate - x) ** 2).sum(1).mean()
    else:
        z = pre.relu() * kept(pre.detach(), architecture)
    loss = penalty
    for width in widths:
        loss = loss + ((x - (z[:, :width] @ wd[:width] + bd)) ** 2).sum() / variance / len(widths)
    if dead is not None:
        e = (x - (z @ wd + bd)).detach()
        masked = torch.where(dead, pre, -torch.inf)
        best = masked >= masked.sort(dim=1, descending=True).values[:, sae.activation.aux_k - 1 :][:, :1]
        e_hat = torch.where(best & dead, pre.relu(), 0.0) @ wd
        loss = loss + ((e - e_hat) ** 2).sum() / ((e - e.mean(0)) ** 2).sum() / 32
    loss.backward()
    return loss, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(sae: SparseAutoencoder, loss: Tensor, expected: Tensor, grads: dict[str, Tensor]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("n_dead", [0, 4, 20])
def test_top_k_family_and_aux_k_equal_the_dense_reference(architecture, kernel, n_dead):
    sae = make(architecture, kernel=kernel)
    dead = torch.arange(D_SAE) >= D_SAE - n_dead
    sae.activity.silent_tokens[dead] = 100
    assert sae.activation.aux_k == 8  # d_in / 2 = 6, rounded to a power of two
    step, _ = sae.losses(rows(), rows())
    step.loss.backward()
    assert_same(sae, step.loss, *reference(sae, rows(), architecture, dead=dead if n_dead else None))


def test_aux_k_reaches_the_encoder_of_dead_latents():
    sae = make("topk", kernel="sparse")
    silent = int(sae.losses(rows(), rows())[1].fired.logical_not().nonzero()[0])
    sae.activity.silent_tokens[silent] = 100
    sae.losses(rows(), rows())[0].loss.backward()
    assert sae.W_enc.grad[silent].abs().sum() > 0


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_matryoshka_equals_the_dense_reference(name, kernel):
    sae = make({"name": name, "prefixes": [4, 16, 0.5, 1.0]}, kernel=kernel)
    step, _ = sae.losses(rows(), rows())
    step.loss.backward()
    assert_same(sae, step.loss, *reference(sae, rows(), name, widths=(4, 16, 32, 64)))


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_penalised_architectures_equal_the_dense_reference(architecture):
    sae = make(architecture)
    step, _ = sae.losses(rows(), rows())
    step.loss.backward()
    assert_same(sae, step.loss, *reference(sae, rows(), architecture))


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_jumprelu_gradients_follow_the_papers_equations(penalty):
    """Rajamanoharan et al. 2024, equations 11 and 12, written out; with tanh they also reach the encoder."""
    width = 0.4
    sae = make({"name": "jumprelu", "penalty": penalty, "bandwidth": width, "coefficient": 0.01})
    x = rows()
    step, _ = sae.losses(x, x)
    step.loss.backward()
    we, be, wd, bd = (p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    theta = sae.activation.threshold.detach()
    pre = (x - bd) @ we.T + be
    z = (pre * (pre > theta)).requires_grad_()
    error = ((x - (z @ wd + bd)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    count = (0.01 * torch.tanh(4 * z * wd.norm(dim=1)).sum(1).mean()) if penalty == "tanh" else 0.0
    (d_z,) = torch.autograd.grad(error + count, z)
    kernel = ((pre - theta).abs() < width / 2).double() / width
    d_theta = -(theta * kernel * d_z).sum(0) - (0.01 / BATCH * kernel.sum(0) if penalty == "l0" else 0)
    d_pre = d_z * (pre > theta) + (theta * kernel * d_z if penalty == "tanh" else 0)
    torch.testing.assert_close(sae.activation.threshold.grad, d_theta.float())  # float32 in every precision
    torch.testing.assert_close(sae.W_enc.grad, d_pre.T @ (x - bd))
    torch.testing.assert_close(sae.b_enc.grad, d_pre.sum(0))


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_transcoder_with_skip_equals_autograd_on_the_dense_formula(kernel):
    d_in = {"a": 12, "b": 7}
    sae = SparseAutoencoder(
        d_in, D_SAE, k=K, input_hook="a", output_hook="b", skip=True, kernel=kernel
    ).double()
    x, y = rows(0, 12), rows(1, 7)
    step, _ = sae.losses(x, y)
    step.loss.backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    pre = x @ leaves["W_enc"].T + leaves["b_enc"]
    z = pre.relu() * kept(pre.detach(), "topk")
    out = z @ leaves["W_dec"] + leaves["b_dec"] + x @ leaves["W_skip"].T
    loss = ((y - out) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    loss.backward()
    assert_same(sae, step.loss, loss, {name: leaf.grad for name, leaf in leaves.items()})


def test_sparse_and_dense_pass_agree_on_a_wide_float32_dictionary():
    """The size uses the grouped top-k and several chunks of rows."""
    sae = SparseAutoencoder(16, 8192, k=8)
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    a, b = sparse_pass(x, sae.weights, sae.activation), dense_pass(x, x, sae.weights, sae.activation, 1.0)
    torch.testing.assert_close(a.reconstructions, b.reconstructions)
    assert torch.equal(a.fired, b.fired)
    assert a.active == b.active


def test_gradients_reach_the_rows_that_are_encoded():
    """Needed when a dictionary is spliced into a model."""
    sae = make("topk", kernel="sparse")
    x = rows().requires_grad_()
    dense = x.detach().clone().requires_grad_()
    sparse_pass(x, sae.weights, sae.activation).reconstructions.square().sum().backward()
    dense_pass(dense, dense, sae.weights, sae.activation, 1.0).reconstructions.square().sum().backward()
    torch.testing.assert_close(x.grad, dense.grad)
