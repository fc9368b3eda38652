"""A model that was given loaded is run by one thread at a time, and forward passes that ignore that give no rows."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeplens_lightning.model.capture import lock_of
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from tests.model.segments import SEGMENTS
from tests.support.model_families import randomised, tiny_config


def causal() -> PreTrainedModel:
    return randomised(AutoModelForCausalLM.from_config(tiny_config("gpt2")))


def opened(model: PreTrainedModel, hook: str = "mlp_out") -> FrozenModel:
    return FrozenModel.load(model, resolve(model, 1, hook), device="cpu", isolation="packed")


def in_a_thread(work: Callable[[], Any]) -> Any:
    """The result of a function that runs in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def is_free(model: FrozenModel) -> bool:
    """Whether another thread could read the model now."""

    def attempt() -> bool:
        lock = lock_of(model.base)
        if taken := lock.acquire(blocking=False):
            lock.release()
        return taken

    free: bool = in_a_thread(attempt)
    return free


def test_all_that_read_one_model_share_its_lock() -> None:
    model = causal()
    first, second, base = opened(model), opened(model, "resid_post"), opened(model.transformer)
    compiled, other = opened(torch.compile(model, backend="eager")), opened(causal())
    for held in (first, second, base, compiled):
        with held.exclusive() as yielded:
            assert yielded is model.transformer
            assert not any(is_free(each) for each in (first, second, base, compiled))
            assert is_free(other)
        assert all(is_free(each) for each in (first, second, base, compiled))


def test_the_thread_that_holds_the_model_may_take_it_again_and_read_it() -> None:
    model = opened(causal())
    expected = model.activations(SEGMENTS[0][None])
    with model.exclusive(), model.exclusive() as base:
        base(SEGMENTS[0][None])
        assert torch.equal(
            model.activations(SEGMENTS[0][None])["layers.1.mlp_out"], expected["layers.1.mlp_out"]
        )
        assert not is_free(model)
    assert is_free(model)


def test_an_exception_gives_the_model_free() -> None:
    model = opened(causal())
    with pytest.raises(ZeroDivisionError), model.exclusive():
        _ = 1 / 0
    assert is_free(model)
    model.close()
    with pytest.raises(RuntimeError, match="was closed"), model.exclusive():
        pass


def test_a_forward_pass_of_another_thread_neither_gives_rows_nor_is_ended() -> None:
    model = causal()
    logits = model(SEGMENTS[3][None]).logits
    frozen = FrozenModel.load(
        model, resolve(model, 1, ["resid_pre", "mlp_out"]), device="cpu", isolation="packed"
    )
    expected = frozen.activations(SEGMENTS[1][None])
    seen: list[torch.Tensor] = []

    def run_beside(module: torch.nn.Module, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(in_a_thread(lambda: model(SEGMENTS[3][None]).logits))

    handle = model.transformer.h[1].attn.register_forward_hook(run_beside)
    found = frozen.activations(SEGMENTS[1][None])
    handle.remove()
    assert torch.allclose(seen[0], logits, atol=1e-4)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
