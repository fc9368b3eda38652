import pytest
import torch
from transformers import AutoModel

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.isolation import relative_error
from tests.model.segments import SEGMENTS, together
from tests.support.model_families import randomised, rope_config


@pytest.mark.parametrize("name", ["dynamic_rope", "longrope"])
def test_rope_scaling_by_length_gives_isolation_equal_beyond_the_original_context(name: str) -> None:
    config = rope_config(name)
    model = randomised(AutoModel.from_config(config))
    points = resolve(config, 2, "resid_post")
    beyond = FrozenModel.load(model, points, device="cpu", seq_length=40)
    assert beyond.isolation == "equal"
    assert FrozenModel.load(model, points, device="cpu").isolation == "equal"
    assert FrozenModel.load(model, points, device="cpu", seq_length=24).isolation == "packed"
    last = FrozenModel.load(model, resolve(config, None, "final_norm"), device="cpu", seq_length=40)
    assert last.isolation == "equal"
    for segment in (*SEGMENTS, *reversed(SEGMENTS)):  # a long segment must not change later ones
        expected = randomised(AutoModel.from_config(config))(segment[None]).last_hidden_state
        rows = together(last, [segment], "equal")[0]["final_norm"]
        assert relative_error(rows, expected).max() < 1e-5
        beside_another = last.activations(torch.stack([segment, segment.roll(1)]))["final_norm"][:1]
        assert torch.equal(beside_another, rows)
