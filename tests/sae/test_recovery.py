"""Every architecture recovers the dictionary from which synthetic rows were made."""

from itertools import count

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder
from tests.support.synthetic import codes, dictionary, mean_max_cosine, train

D, N, D_SAE, ACTIVE = 32, 48, 96, 2


def batches(true, n: int = 512):
    for seed in count():
        yield codes(n, N, ACTIVE, seed) @ true


@pytest.mark.parametrize(
    "architecture",
    [
        "topk",
        "batch_topk",
        {"name": "topk", "prefixes": [48, 96]},
        {"name": "batch_topk", "prefixes": [48, 96]},
        {"name": "relu", "l1": 0.2},
        {"name": "jumprelu", "coefficient": 0.03, "bandwidth": 0.2, "init_threshold": 0.2},
        {"name": "jumprelu", "penalty": "tanh", "coefficient": 0.05, "bandwidth": 0.1, "init_threshold": 0.1},
        {"name": "gated", "l1": 0.5},
    ],
    ids=str,
)
def test_a_known_dictionary_is_recovered(architecture):
    true = dictionary(N, D)
    sae = SparseAutoencoder(D, D_SAE, k=3, architecture=architecture, lr=3e-3, dead_after_tokens=20_000)
    train(sae, batches(true), 600)
    assert mean_max_cosine(true, sae.W_dec) > 0.9


def test_a_transcoder_recovers_what_it_writes_and_a_skip_helps_where_the_map_is_linear():
    read, write, linear = dictionary(N, D), dictionary(N, 24, seed=1), dictionary(24, D, seed=2)

    def pairs(linear):
        for seed in count():
            z = codes(512, N, ACTIVE, seed)
            x = z @ read
            yield {"in": x, "out": z @ write + x @ linear.T}

    def held_out_fvu(linear, *, skip: bool) -> tuple[SparseAutoencoder, float]:
        hooks = {"input_hook": "in", "output_hook": "out"}
        sae = SparseAutoencoder({"in": D, "out": 24}, D_SAE, k=3, skip=skip, lr=3e-3, **hooks)
        train(sae, pairs(linear), 400)
        metrics = sae.new_metrics()
        sae.measure(next(pairs(linear)), metrics)
        return sae, float(metrics.compute()["fvu"])

    sae, fvu = held_out_fvu(0 * linear, skip=False)
    assert mean_max_cosine(write, sae.W_dec) > 0.9
    assert fvu < 0.2  # predicting the mean gives 1
    assert held_out_fvu(linear, skip=True)[1] < 0.8 * held_out_fvu(linear, skip=False)[1]


def test_a_crosscoder_recovers_latents_that_hook_points_share():
    parts = {"a": dictionary(N, D), "b": 10 * dictionary(N, 16, seed=1)}  # ten times the norm

    def pairs():
        for seed in count():
            z = codes(512, N, ACTIVE, seed)
            yield {name: z @ part for name, part in parts.items()}

    sae = SparseAutoencoder({"a": D, "b": 16}, D_SAE, k=3, lr=3e-3)
    train(sae, pairs(), 600)
    joint = torch.cat(
        [part / unit for part, unit in zip(parts.values(), sae.write.unit[[0, D]], strict=True)], dim=1
    )
    assert mean_max_cosine(joint, sae.W_dec) > 0.9
    x = next(pairs())
    out = sae(x)
    assert {name: rows.shape for name, rows in out.items()} == {name: rows.shape for name, rows in x.items()}
    for name in x:  # the larger rows of one hook point do not dominate
        assert ((out[name] - x[name]) ** 2).sum() / ((x[name] - x[name].mean(0)) ** 2).sum() < 0.1
