from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deeplens_lightning.model.isolation import choose, relative_error
from deeplens_lightning.options import Isolation

TABLE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


def mixing(mode: Isolation, noise: float = 0.0, dtype: torch.dtype = torch.float32):
    """A model that gives a segment its own rows with this isolation and the later ones, and wrong rows before."""
    order = ["packed", "padded", "equal", "none"]

    def run(
        tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        used = "packed" if position_ids is not None else "padded" if attention_mask is not None else "equal"
        rows = TABLE[tokens]
        if order.index(used) < order.index(mode) and len(tokens) > 1:
            rows = rows + 0.1
        return {"here": (rows * (1 + noise * len(tokens))).to(dtype)}

    return run


@pytest.mark.parametrize("mode", ["packed", "padded", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_isolation_with_the_rows_of_the_segment_alone_is_chosen(
    mode: Isolation, dtype: torch.dtype
) -> None:
    run = mixing(mode, dtype=dtype)
    assert choose(run, vocab_size=50, block=16, exact=dtype == torch.float32) == mode


def test_rounding_errors_of_the_device_do_not_count_as_a_difference() -> None:
    assert choose(mixing("packed", noise=1e-4), vocab_size=50, block=64) == "packed"


def test_large_errors_in_packed_rows_are_not_put_down_to_rounding() -> None:
    assert choose(mixing("packed", noise=2e-3), vocab_size=50, block=64) == "equal"


def test_a_model_whose_rows_depend_on_the_batch_is_refused() -> None:
    advice = r"segments influence each other with model_options.isolation=\"none\""
    with pytest.raises(ValueError, match=rf"relative error .*; accept that {advice}"):
        choose(mixing("none"), vocab_size=50, block=64)
    with pytest.raises(ValueError, match=rf"relative error .*; run it in float32, or accept that {advice}"):
        choose(mixing("none"), vocab_size=50, block=64, exact=False)


def test_the_probe_does_not_use_the_global_random_generator() -> None:
    state = torch.random.get_rng_state()
    choose(mixing("packed"), vocab_size=50, block=64, lengths=[40])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_relative_error_is_per_row_with_a_lower_bound_for_the_norm() -> None:
    b = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    a = b + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.001]])
    assert relative_error(a, b).tolist() == pytest.approx([0.1, 0.0, 0.001 / (1e-3 * 5.0)])
    assert relative_error(b, b).max() == 0
