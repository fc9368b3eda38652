"""A tensor given as `shards=` is served as the same tensor in a file, without a copy on the disk."""

import numpy as np
import pytest
import torch

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards import ShardError
from tests.support.recorder import Recorder, assert_same
from tests.support.training import sae, trainer

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(3000, 12, generator=GENERATOR)


def settings(shards, **changes):
    return {"shards": shards, "batch_size": 100, "val_fraction": 0.1, **changes}


def served(shards, **changes):
    """The training batches and the validation batches of an epoch."""
    data = ActivationDataModule(**settings(shards, **changes))
    data.setup("fit")
    found = [batch.clone() for batch in data.train_dataloader()], list(data.val_dataloader())
    data.teardown("fit")
    return found


@pytest.mark.parametrize("shuffle", ["global", "window", "none"])
@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS.bfloat16(), torch.nn.Parameter(ROWS), ROWS.t().contiguous().t()],
    ids=["float32", "bfloat16", "parameter", "transposed"],
)
def test_a_tensor_gives_the_batches_of_its_file(rows, shuffle, tmp_path):
    torch.save(rows, tmp_path / "rows.pt")
    options = {"cache_options": CacheOptions(shuffle=shuffle)}
    in_memory, in_file = served(rows, **options), served(str(tmp_path / "rows.pt"), **options)
    for here, there in zip(in_memory, in_file, strict=True):
        assert len(here) == len(there) > 1
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    every = torch.cat([batch for part in in_memory for batch in part])
    assert torch.equal(every.sort(dim=0).values, rows.detach().float().sort(dim=0).values)


def test_layer_and_hook_name_the_rows_and_the_width_is_known_at_once():
    assert ActivationDataModule(shards=ROWS).hook_names == ()
    named = ActivationDataModule("gpt2", 5, "mlp_out", shards=ROWS)
    assert (named.hook_names, named.d_in, named.hf_model) == (("layers.5.mlp_out",), 12, "gpt2")
    assert named.hparams["data"]["shards"] == "tensor of shape (3000, 12)"


def test_a_fit_on_a_tensor_continues_on_the_same_values_alone(tmp_path):
    def fit(rows, steps, ckpt_path=None):
        data, recorder = ActivationDataModule(**settings(rows)), Recorder()
        run = trainer(tmp_path, recorder, max_steps=steps)
        run.fit(sae(data), data, ckpt_path=ckpt_path)
        return run, recorder.batches

    _, whole = fit(ROWS, 12)
    run, first = fit(ROWS, 5)
    run.save_checkpoint(tmp_path / "a.ckpt")
    _, rest = fit(ROWS.clone(), 12, tmp_path / "a.ckpt")
    assert_same(first + rest, whole)
    other = ROWS.clone()
    other[-1, -1] += 1
    with pytest.raises(ValueError, match="shards"):
        fit(other, 12, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.zeros(2, 3, 4), r"shape \(2, 3, 4\), expected \(rows, d_in\).*x.reshape"),
        (torch.zeros(0, 4), "at least one row"),
        (torch.zeros(2, 4, dtype=torch.float64), "torch.float64, expected float32.*give x.float()"),
        (torch.zeros(2, 4, device="meta"), "on meta .*x.cpu()"),
        (torch.zeros(2, 4).to_sparse(), "x.to_dense()"),
        ([ROWS, ROWS], "type Tensor, which is not a path.*one tensor"),
        (np.zeros((2, 4), np.float32), r"type ndarray: give .* torch.from_numpy\(x\)"),
        (5, "type int: give a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_matrix_of_rows_is_refused_with_the_fix(rows, words):
    with pytest.raises(ValueError, match=words):
        _ = ActivationDataModule(shards=rows).d_in


def test_rows_that_are_not_finite_are_never_served():
    rows = ROWS.clone()
    rows[57, 3] = float("nan")
    with pytest.raises(
        ShardError, match=r"the tensor \(3000, 12\) of shards= holds NaN or infinity in row 57"
    ):
        served(rows)


def test_settings_of_files_are_refused():
    with pytest.raises(ValueError, match=r"cache_options\.checksums would have no effect"):
        ActivationDataModule(shards=ROWS, cache_options=CacheOptions(checksums=True))
