"""On an accelerator nothing waits for the device between logging steps, and no tensor comes from the wrong device."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.training import DictionaryTraining
from tests.support.fake_accelerator import (
    WaitsError,
    fake_accelerator,
    forked,
    moved,
    refuse_copies,
    refuse_float64,
)
from tests.support.synthetic import Rows

D = 32
PREFIXES = {"name": "topk", "prefixes": [64, 0.5, 1.0]}
EVERY = ["topk", PREFIXES, "batch_topk", "matryoshka", "relu", "jumprelu", "gated"]
HOOKS = {"in": D, "out": 24}
SHARED = {"d_sae": 512, "k": 4, "dead_after_tokens": 100}


class Steps:
    """What a module reads from its Trainer, at a step that logs nothing."""

    world_size = 1
    strategy = None
    log_every_n_steps = 50
    global_step = 3
    accumulate_grad_batches = 1
    datamodule = Rows([])


STEPS = Steps()  # modules keep weak references to it


def batch(
    d_in: int | dict[str, int], rows: int = 64, device: torch.device | str = "cpu"
) -> Tensor | dict[str, Tensor]:
    if isinstance(d_in, dict):
        return {name: torch.randn(rows, width, device=device) for name, width in d_in.items()}
    return torch.randn(rows, d_in, device=device)


KINDS = {
    "every architecture": lambda: SparseAutoencoderGrid(D, {"architecture": EVERY}, SHARED),
    "bfloat16": lambda: SparseAutoencoder(
        D, architecture="jumprelu", on_nonfinite="skip", **SHARED
    ).bfloat16(),
    "transcoder": lambda: SparseAutoencoder(HOOKS, input_hook="in", output_hook="out", skip=True, **SHARED),
    "crosscoder": lambda: SparseAutoencoder(HOOKS, architecture="batch_topk", layer_norm=True, **SHARED),
}


@pytest.fixture(params=KINDS)
def module(request) -> DictionaryTraining:
    """A module that is initialised from a batch with a normalisation, as at the start of a fit."""
    module = KINDS[request.param]()
    for sae in module.dictionaries.values():
        shifts = {name: Scaling(torch.ones(d), torch.ones(d)) for name, d in HOOKS.items()}
        sae.prepare(shifts if isinstance(sae.d_in, dict) else shifts["in"])
        sae.initialize_from(batch(sae.d_in))
    return module


@forked
def test_a_training_step_neither_waits_nor_mixes_devices(module):
    with fake_accelerator() as device:
        moved(module, device)
        module._device = device
        module.trainer = STEPS
        optimizer = torch.optim.Adam(module.parameters(), foreach=False)
        sae = next(iter(module.dictionaries.values()))
        rows = batch(sae.d_in, device=device)
        with refuse_copies(), refuse_float64():
            for _ in range(2):
                module.on_train_batch_start(rows, 0)
                module.training_step(rows, 0).backward()
                module.configure_gradient_clipping(optimizer)
                optimizer.step()
                for each in module.dictionaries.values():
                    each.project()


# torchmetrics copies its state.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@forked
def test_held_out_metrics_wait_only_when_they_are_computed(module):
    with fake_accelerator() as device:
        moved(module, device)
        for sae in module.dictionaries.values():
            metrics = sae.new_metrics()
            with refuse_copies(), refuse_float64():
                for _ in range(2):
                    sae.measure(batch(sae.d_in, device=device), metrics)
            with refuse_float64(), pytest.raises(DataDependentOutputException):  # it reads the number of rows
                metrics.compute()


@forked
def test_normalisation_is_copied_to_a_device_once():
    scaling = Scaling(torch.ones(D), torch.full((D,), 2.0))
    with fake_accelerator() as device:
        rows = torch.randn(4, D, device=device)
        with pytest.raises(WaitsError), refuse_copies():
            scaling.apply(rows)
        scaling.apply(rows)
        with refuse_copies(), refuse_float64():
            assert scaling.undo(scaling.apply(rows)).device == device


def test_a_normalisation_on_the_cpu_is_not_copied():
    scaling = Scaling(torch.ones(D), torch.full((D,), 2.0))
    rows = torch.randn(4, D)
    torch.testing.assert_close(scaling.undo(scaling.apply(rows)), rows)


@forked
def test_the_fake_accelerator_finds_waits_foreign_tensors_and_float64():
    cases = [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool(x.any()), DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), WaitsError),
        (lambda x: torch.tensor([1.0], device=x.device), WaitsError),
        (lambda x: x.copy_(torch.zeros(4, D)), WaitsError),
        (lambda x: x + torch.zeros(4, D), RuntimeError),
        (lambda x: x.double(), TypeError),
        (lambda x: torch.zeros(1, dtype=torch.float64, device=x.device), TypeError),
    ]
    with fake_accelerator() as device:
        for wait, error in cases:
            with refuse_copies(), refuse_float64(), pytest.raises(error):
                wait(torch.randn(4, D, device=device))
        with refuse_copies(), refuse_float64():
            torch.randn(4, D, device=device).to("cpu", non_blocking=True).double()


def test_float64_can_be_refused_on_the_cpu_too():
    with refuse_float64(on_host=True), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
