import torch

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.text.packing import Blocks
from tests.support.model_families import tiny_model


def test_only_kept_positions_have_provenance_and_pads_are_never_kept() -> None:
    model = tiny_model("gpt2")
    frozen = FrozenModel.load(model, resolve(model.config, 1, "mlp_out"), device="cpu")
    blocks = Blocks(
        tokens=torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        positions=torch.tensor([[0, 1, 0, 1], [0, 1, -1, -1]]),
        documents=torch.tensor([[3, 3, 4, 4], [5, 5, -1, -1]]),
        hashes=torch.tensor([[30, 30, 40, 40], [50, 50, 0, 0]]),
        offsets=torch.tensor([[0, 1, 0, 1], [-1, 0, -1, -1]]),
        keep=torch.tensor([[True, False, True, True], [False, True, False, False]]),
    )
    batch = run_model(frozen, blocks)
    assert batch.activations["layers.1.mlp_out"].shape == (8, 32)
    assert batch.kept.tolist() == [0, 2, 3, 5]
    assert batch.provenance.tolist() == [[30, 3, 0, 5], [40, 4, 0, 7], [40, 4, 1, 8], [50, 5, 0, 10]]
    alone = frozen.activations(torch.tensor([[7, 8]]))["layers.1.mlp_out"][0]
    torch.testing.assert_close(batch.activations["layers.1.mlp_out"][[2, 3]], alone)
