from pathlib import Path

import torch
from transformers import AutoModel

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from tests.support.model_families import randomised, tiny_config


def test_other_weights_have_another_identity(tmp_path: Path) -> None:
    model = randomised(AutoModel.from_config(tiny_config("qwen2")))
    points = resolve(model.config, 1, "mlp_out")
    first = FrozenModel.load(model, points, device="cpu").identity
    model.save_pretrained(tmp_path)
    assert FrozenModel.load(str(tmp_path), points, device="cpu").identity["weights"] == first["weights"]
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.mul_(2)
    assert FrozenModel.load(model, points, device="cpu").identity == first
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.mul_(2)
    assert FrozenModel.load(model, points, device="cpu").identity != first
