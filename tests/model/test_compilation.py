from transformers import AutoModel

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.isolation import relative_error
from tests.model.segments import SEGMENTS
from tests.support.model_families import randomised, snapshot, tiny_config


def test_a_compiled_model_gives_the_same_rows_and_is_unchanged_after_its_last_user_closes() -> None:
    model = randomised(AutoModel.from_config(tiny_config("llama", num_hidden_layers=2)))
    before = snapshot(model)
    points = resolve(model.config, 1, ["resid_pre", "mlp_out"])
    expected = FrozenModel.load(model, points, device="cpu").activations(SEGMENTS[1][None])
    first, second = (FrozenModel.load(model, points, device="cpu", compile_model=True) for _ in range(2))
    first.close()
    rows = second.activations(SEGMENTS[1][None])
    second.close()
    for name, x in expected.items():
        assert relative_error(rows[name], x).max() < 1e-5
    after = snapshot(model)
    assert before.pop("weights").keys() == after.pop("weights").keys()
    assert before == after
