"""Triton kernels on a CPU, in Triton's interpreter; `test_triton_kernels.py` runs this file in a process of its own."""

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplens_lightning.sae import SparseAutoencoder, sparse, straight_through
from deeplens_lightning.sae.sparse import decode_entries, encode_entries, make_code
from deeplens_lightning.sae.straight_through import jump_relu, step
from deeplens_lightning.sae.triton_kernels import bag_sum

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-7,
}  # the interpreter cuts bfloat16 off, a GPU rounds to nearest


@pytest.fixture(autouse=True)
def _on_kernels(monkeypatch):
    assert os.environ["TRITON_INTERPRET"] == "1"
    use(monkeypatch, kernels=True)


def use(monkeypatch, *, kernels: bool) -> None:
    """Choose the kernels or torch for tensors on the CPU."""
    for module in (sparse, straight_through):
        monkeypatch.setattr(module, "uses_triton", lambda x: kernels)


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Compare with a reference in float64, relative to its largest value."""
    assert ours.dtype == dtype
    largest = max([1.0, *expected.detach().abs().flatten().tolist()])
    tolerance = {"rtol": 0.0, "atol": roundings * ROUNDING[dtype] * largest}
    torch.testing.assert_close(ours.detach().double(), expected.detach(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 300])
@pytest.mark.parametrize("lengths", [[1], [0], [0, 17, 0, 0, 1, 40, 16, 0]], ids=["one", "empty", "ragged"])
def test_bag_sums_and_their_gradient_equal_embedding_bag(lengths, width, dtype):
    n, table = sum(lengths), random(9, width, dtype=dtype)
    indices = torch.randint(
        0, 9, (n,), generator=torch.Generator().manual_seed(1)
    )  # rows occur again in a bag
    starts = torch.tensor([0, *lengths]).cumsum(0)
    values = random(n, dtype=dtype, seed=2).requires_grad_()
    wide = values.detach().double().requires_grad_()
    ours = bag_sum(indices, table, starts, values)
    options = {"mode": "sum", "include_last_offset": True}
    expected = F.embedding_bag(indices, table.double(), starts, per_sample_weights=wide, **options)
    grad = random(*ours.shape, dtype=dtype, seed=3)
    ours.backward(grad)
    expected.backward(grad.double())
    assert_near(ours, expected, dtype)
    assert_near(values.grad, wide.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_rows", "k", "widths"),
    [(1, 1, ()), (1, 5, (2, 5, 12)), (9, 1, (2, 5, 12)), (9, 19, ()), (9, 5, (2, 5, 12))],
)
def test_sparse_encoding_and_decoding_equal_autograd_on_dense_float64(n_rows, k, widths, dtype):
    """Most latents are empty in some cases, and every row has a latent twice where k is more than 1."""
    d_sae, d_in, d_out = 12, 29, 31
    latents = torch.randint(0, d_sae, (n_rows, k), generator=torch.Generator().manual_seed(4))
    latents[:, -1] = latents[:, 0]
    latents = latents.sort(dim=1).values
    rows, columns = torch.arange(n_rows).repeat_interleave(k), latents.flatten()
    code = make_code(rows, columns, n_rows, d_sae, widths)
    inputs = {
        "x": random(n_rows, d_in),
        "center": random(d_in, seed=1),
        "encoder": random(d_sae, d_in, seed=2),
        "bias": random(d_sae, seed=3),
        "decoder": random(d_sae, d_out, seed=4),
    }
    ours = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    leaves = {name: x.detach().double().requires_grad_() for name, x in ours.items()}

    pre = (leaves["x"] - leaves["center"]) @ leaves["encoder"].T + leaves["bias"]
    acts = pre[rows, columns].relu()
    values = acts.detach().to(dtype)
    acts = acts + (values.double() - acts).detach()  # the values as rounded, with the gradient of the formula
    dense = torch.zeros(n_rows, d_sae, dtype=torch.float64).index_put((rows, columns), acts, accumulate=True)
    edges = (0, *(widths or (d_sae,)))
    parts = [dense[:, a:b] @ leaves["decoder"][a:b] for a, b in pairwise(edges)]
    expected = torch.stack(parts, 1).flatten(0, 1)

    encoded = encode_entries(ours["x"], ours["center"], ours["encoder"], ours["bias"], values, code)
    decoded = decode_entries(encoded, ours["decoder"], code)
    grad = random(*expected.shape, dtype=dtype, seed=5)
    decoded.backward(grad)
    expected.backward(grad.double())
    assert_near(decoded, expected, dtype)
    for name, leaf in leaves.items():  # of bfloat16: gradients pass through rounded values and rows
        assert_near(ours[name].grad, leaf.grad, dtype, roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 17, 129)])
@pytest.mark.parametrize("to_input", [False, True])
def test_jump_relu_gradients_equal_those_of_torch(to_input, shape, dtype, monkeypatch):
    wide = random(*shape).to(dtype).float()
    theta = random(shape[-1], seed=1).abs()
    grad = random(*shape, seed=2).to(dtype)
    theirs = [wide.clone().requires_grad_(), theta.clone().requires_grad_()]
    use(monkeypatch, kernels=False)
    jump_relu(*theirs, 0.7, to_input=to_input).backward(grad.float())
    use(monkeypatch, kernels=True)
    ours = [wide.to(dtype).requires_grad_(), theta.clone().requires_grad_()]
    jump_relu(*ours, 0.7, to_input=to_input).backward(grad)
    assert_near(ours[0].grad, theirs[0].grad.double(), dtype)
    assert_near(ours[1].grad, theirs[1].grad.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_step_function_equals_that_of_torch(dtype, monkeypatch):
    """Its incoming gradient is one number in every place, without memory of its own for each."""
    pre, theta = random(65, 130).to(dtype), random(130, seed=1).abs()
    found = []
    for kernels in (False, True):
        use(monkeypatch, kernels=kernels)
        leaf = theta.clone().requires_grad_()
        step(pre if kernels else pre.float(), leaf, 0.7).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["matryoshka", "jumprelu"])
def test_a_training_step_equals_the_one_without_kernels_and_repeats_bit_for_bit(architecture, monkeypatch):
    found = []
    for kernels in (False, True, True):
        use(monkeypatch, kernels=kernels)
        kernel = "dense" if architecture == "jumprelu" else "sparse"
        sae = SparseAutoencoder(13, 19, k=3, architecture=architecture, kernel=kernel)
        losses, _ = sae.losses(random(5, 13), random(5, 13))
        losses.loss.backward()
        found.append({"loss": losses.loss.detach()} | {name: p.grad for name, p in sae.named_parameters()})
    torch_only, ours, again = found
    torch.testing.assert_close(ours, torch_only, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
