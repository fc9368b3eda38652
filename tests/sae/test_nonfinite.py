"""Rows with NaN or infinity, and batches without an active latent, change nothing but the count of what was left out."""

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.nonfinite import CHECK_EVERY, NonFiniteRows, NonFiniteRowsError
from deeplens_lightning.types import Provenance
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D, N = 16, 24
TRUE = dictionary(N, D)
EVERY = ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"]


class Placed(Rows):
    """Row i of every batch is token 2000 + i at position 1000 + i of document i."""

    def provenance(self, batch):
        row = torch.arange(len(batch))
        return Provenance(row, row, row + 1000, row + 2000)

    def test_dataloader(self):
        return self.val_dataloader()


def batches(n: int, offset: int = 0) -> list[torch.Tensor]:
    return [codes(64, N, 2, seed=offset + i) @ TRUE for i in range(n)]


def small(**settings) -> SparseAutoencoder:
    return SparseAutoencoder(**{"d_in": D, "d_sae": 128, "k": 4, "lr": 3e-3, **settings})


def spoiled(x: torch.Tensor, row: int = 7) -> torch.Tensor:
    x = x.clone()
    x[row, 3], x[row + 2, 0] = torch.nan, torch.inf
    return x


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_batch_without_an_active_latent_leaves_the_threshold_alone(kernel, value):
    first, second = batches(2)
    thresholds = []
    for batch in ([first, second], [first, torch.full_like(first, value), second]):
        sae = small(architecture="batch_topk", kernel=kernel, on_nonfinite="skip")
        sae.prepare(None)
        sae.initialize_from(first)
        with torch.no_grad():
            sae.b_dec.zero_()  # then a row of zeros has no active latent
        for x in batch:
            sae.step(x)
        thresholds.append((sae.activation.threshold, sae.activation.threshold_batches))
    assert thresholds[0] == thresholds[1]
    assert thresholds[0][0].isfinite()


@pytest.mark.parametrize("architecture", EVERY)
def test_a_first_batch_of_nan_is_not_what_an_sae_is_initialised_from(tmp_path, architecture):
    bad, *rest = batches(6)
    saes = []
    for data in (rest, [torch.full_like(bad, torch.nan), *rest]):
        sae = small(architecture=architecture, on_nonfinite="skip")
        trainer(tmp_path, max_steps=len(data)).fit(sae, Rows(data))
        saes.append(sae)
    assert torch.equal(saes[0].read.unit, saes[1].read.unit)
    assert saes[1].read.unit[0] != 1
    assert all(tensor.isfinite().all() for tensor in saes[1].state_dict().values())


@pytest.mark.parametrize("architecture", EVERY)
def test_held_out_figures_are_those_of_the_other_rows(tmp_path, architecture):
    clean, val = batches(2, offset=50)
    sae, figures = small(architecture=architecture, on_nonfinite="skip"), []
    trainer(tmp_path, max_steps=5).fit(sae, Rows(batches(5)))
    keep = [i for i in range(64) if i not in (7, 9)]
    for rows in (val[keep], spoiled(val)):
        fit = trainer(tmp_path)
        fit.validate(sae, Rows([], [clean, rows]), verbose=False)
        figures.append(dict(fit.callback_metrics))
    assert figures[1].pop("val/nonfinite_rows") == 2
    assert figures[0].pop("val/nonfinite_rows") == 0
    assert figures[1]["val/rows"] == 126
    for name, value in figures[0].items():
        torch.testing.assert_close(figures[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_held_out_row_stops_with_its_place_unless_it_is_to_be_skipped(tmp_path):
    first, second = batches(2)
    place = r"held-out batch 1, first is row 7: document 7, position 1007, token 2007"
    with pytest.raises(
        NonFiniteRowsError, match=rf"2 of 128 held-out rows .*\({place}\).*on_nonfinite='skip'"
    ):
        trainer(tmp_path, max_steps=3).fit(small(), Placed(batches(3), [first, spoiled(second)]))
    with pytest.raises(NonFiniteRowsError, match=place):
        trainer(tmp_path).test(small(), Placed([], [first, spoiled(second)]), verbose=False)


def test_a_training_row_stops_with_its_place(tmp_path):
    data = [*batches(2), spoiled(batches(1)[0]), *batches(2)]
    place = r"step 2, first is row 7: document 7, position 1007, token 2007"
    with pytest.raises(NonFiniteRowsError, match=rf"2 of 64 rows .*\({place}\)"):
        trainer(tmp_path, max_steps=5).fit(small(), Placed(data))


def test_validation_without_bad_rows_logs_no_count_when_they_stop_training(tmp_path):
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(small(), Rows(batches(2), batches(1)))
    assert "val/nonfinite_rows" not in fit.callback_metrics


def test_a_transcoder_leaves_out_rows_that_it_cannot_read_or_write(tmp_path):
    def pairs(n: int, bad: bool) -> list[dict[str, torch.Tensor]]:
        found = [{"in": x, "out": x[:, :8].clone()} for x in batches(n)]
        if bad:
            found[1]["in"] = spoiled(found[1]["in"])
            found[1]["out"][20] = torch.inf
        return found

    hooks = {"input_hook": "in", "output_hook": "out"}
    sae = small(d_in={"in": D, "out": 8}, on_nonfinite="skip", skip=True, **hooks)
    fit = trainer(tmp_path, max_steps=4)
    fit.fit(sae, Rows(pairs(4, bad=True), pairs(2, bad=True)))
    assert sae.nonfinite_rows == fit.callback_metrics["val/nonfinite_rows"] == 3
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
    assert all(value.isfinite() for value in fit.callback_metrics.values())


@pytest.mark.parametrize(("every", "trained"), [(4, 3), (50, 6)])
def test_on_an_accelerator_the_next_step_that_logs_or_the_end_stops_with_the_place(
    tmp_path, monkeypatch, every, trained
):
    """Rows are only recorded in each step, as on a device for which the CPU would wait."""
    monkeypatch.setattr(
        NonFiniteRows, "watch", lambda self, bad, rows, anywhere, describe: self.add(bad, rows, describe)
    )
    first, second, *rest = batches(6)
    sae, fit = small(), trainer(tmp_path, max_steps=6, log_every_n_steps=every)
    place = r"step 1, first is row 7: document 7, position 1007, token 2007"
    with pytest.raises(NonFiniteRowsError, match=rf"2 of \d+ rows .*\({place}\)"):
        fit.fit(sae, Placed([first, spoiled(second), *rest]))
    assert fit.global_step == trained
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


def flags(*rows: int) -> torch.Tensor:
    return torch.isin(torch.arange(8), torch.tensor(rows))


def test_the_first_of_several_batches_is_named_at_the_next_check():
    seen = NonFiniteRows()
    for number, bad in enumerate([None, flags(), flags(5, 6), flags(2), flags()]):
        seen.add(bad, 8, lambda row, number=number: f"batch {number}, row {row}")
    with pytest.raises(NonFiniteRowsError, match=r"3 of 40 rows .*\(batch 2, row 5\)"):
        seen.check()
    assert len(seen) == 0
    seen.add(flags(), 8, None)
    seen.check()


def test_rows_are_checked_after_a_bounded_number_of_batches_even_if_no_step_logs():
    """The meta device stands for an accelerator: what would wait for it fails."""
    seen = NonFiniteRows()
    clean = torch.empty(8, dtype=torch.bool, device="meta")
    for _ in range(CHECK_EVERY - 1):
        seen.watch(clean, 8, clean.sum(), None)
    assert len(seen) == CHECK_EVERY - 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        seen.watch(clean, 8, clean.sum(), None)


def test_a_rank_without_rows_adds_an_empty_batch():
    rows = NonFiniteRows()
    rows.add(torch.zeros(0, dtype=torch.bool), 0, None)
    rows.add(torch.tensor([False, True]), 2, lambda row: f"row {row} of the second batch")
    with pytest.raises(
        NonFiniteRowsError, match=r"1 of 2 rows hold NaN or infinity \(row 1 of the second batch\)"
    ):
        rows.check()
