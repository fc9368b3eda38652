"""`doctor` passes on this machine, each of its checks finds its fault, and the exit code and the JSON say so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning import SparseAutoencoder
from deeplens_lightning.cli.doctor import command, ranks, training
from deeplens_lightning.cli.doctor.fidelity import fidelity, fidelity_own_dtype
from deeplens_lightning.cli.doctor.kernels import kernels_bfloat16, kernels_float32
from deeplens_lightning.cli.doctor.memory import memory
from deeplens_lightning.cli.doctor.ranks import two_ranks
from deeplens_lightning.cli.doctor.speed import step_speed, stream_speed
from deeplens_lightning.cli.doctor.subject import Found, Sizes, Subject, check
from deeplens_lightning.cli.doctor.training import cuda_waits, resume, waits
from deeplens_lightning.cli.main import main
from deeplens_lightning.model import rows
from deeplens_lightning.sae import sparse, straight_through
from deeplens_lightning.stream.live_stream import LiveStream
from deeplens_lightning.stream.loader import ActivationLoader
from deeplens_lightning.text.packing import ModelInputs
from tests.support.models import save_model
from tests.support.texts import texts

SMALL = Sizes(
    documents=8,
    seq_length=64,
    batch=64,
    steps=14,
    d_sae=64,
    pairs=1,
    step_rows=64,
    step_latents=512,
    matmul=64,
)


@pytest.fixture(autouse=True)
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are read at once."""
    found = tuple(text for text in texts(400, 900) if text.strip())
    monkeypatch.setattr("deeplens_lightning.cli.doctor.subject.demo_documents", lambda: found)


@pytest.fixture
def subject(tiny: Any) -> Subject:
    return Subject(device=torch.device("cpu"), hf_model=tiny("llama"), layer=1, hook="mlp_out", sizes=SMALL)


def speed(passed: bool) -> Any:
    @check("speed", target="0.9", advice="buy a faster one", speed=True)
    def measured(subject: Subject) -> Found:
        return Found(passed=passed, figure="0.1", values={"ratio": 0.1})

    return measured


# ---- without a fault


def test_rows_of_a_packed_stream_equal_the_untouched_model(subject: Subject) -> None:
    found = fidelity(subject)
    assert found.passed, found.figure
    assert 0 < found.values["error"] < 1e-5
    assert found.values["rows"] > 200


def test_rows_of_inputs_and_of_a_model_with_bos_equal_the_untouched_model(
    tmp_path: Path, subject: Subject
) -> None:
    folder = save_model(tmp_path, "gemma", bos=True)
    found = fidelity(replace(subject, hf_model=str(folder), hook="resid_pre"))
    assert found.passed, found.figure


def test_a_float32_model_has_no_lower_dtype_to_check(subject: Subject) -> None:
    assert fidelity_own_dtype(subject).passed is None


@pytest.fixture
def half(tiny: Any, tmp_path: Path, subject: Subject) -> Subject:
    """A model that is loaded in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    return replace(subject, hf_model=str(tmp_path))


def test_rows_in_bfloat16_are_as_exact_as_the_untouched_models(half: Subject) -> None:
    found = fidelity_own_dtype(half)
    assert found.passed, found.figure
    assert found.values["dtype"] == "bfloat16"
    assert fidelity(half).passed


def test_a_resumed_training_is_equal(subject: Subject) -> None:
    found = resume(subject)
    assert found.passed, found.figure
    assert found.values == {
        "batches": SMALL.steps - (SMALL.steps // 2 + 1),
        "wrong": 0,
        "largest_difference_of_weights": 0.0,
    }


@pytest.mark.parametrize("run", [kernels_float32, kernels_bfloat16])
def test_kernels_equal_their_references(run: Any, subject: Subject) -> None:
    found = run(subject)
    assert found.passed, found.figure


def test_two_ranks_end_with_equal_weights(subject: Subject) -> None:
    found = two_ranks(subject, start="fork")
    assert found.passed, found.figure


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Wide rows that cost little: those of the embedding."""
    folder = save_model(tmp_path_factory.mktemp("wide"), "llama", width=1024, layers=1)
    return Subject(device=torch.device("cpu"), hf_model=str(folder), layer=0, hook="resid_pre", sizes=SMALL)


def test_memory_is_the_buffer_once(wide: Subject) -> None:
    found = memory(wide)
    assert found.passed, found.figure
    assert found.values["grown"] > 0.5 * found.values["buffer"]


def test_waits_do_not_apply_to_a_cpu(subject: Subject) -> None:
    assert waits(subject).passed is None


@pytest.mark.parametrize("run", [stream_speed, step_speed])
def test_speeds_are_measured_with_their_targets(run: Any, subject: Subject) -> None:
    found = run(subject)
    assert found.speed
    assert found.passed is not None, found.figure
    assert all(value > 0 for value in found.values.values())


# ---- with a fault


def leaking(blocks: Any, isolation: str) -> ModelInputs:
    return ModelInputs(tokens=blocks.tokens)


def test_segments_that_leak_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "model_inputs", leaking)
    found = fidelity(subject)
    assert found.passed is False
    assert found.values["error"] > 1e-3


def test_segments_that_leak_in_bfloat16_are_found(half: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "model_inputs", leaking)
    assert fidelity_own_dtype(half).passed is False


def test_a_token_that_is_not_served_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ActivationLoader._iterate

    def without_the_first(self: ActivationLoader) -> Iterator[Any]:
        batches = whole(self)
        next(batches)
        yield from batches

    monkeypatch.setattr(ActivationLoader, "_iterate", without_the_first)
    found = fidelity(subject)
    assert found.passed is False
    assert "64 of" in found.figure


def test_a_batch_that_is_skipped_after_resuming_is_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_to = ActivationLoader.go_to
    monkeypatch.setattr(
        ActivationLoader, "go_to", lambda self, at, skip, counters: go_to(self, at, skip + 1, counters)
    )
    found = resume(subject)
    assert found.passed is False
    assert found.values["wrong"] > 0


def test_weights_that_differ_after_resuming_are_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SparseAutoencoder.load_state_dict

    def rounded(self: SparseAutoencoder, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        state = state | {"W_dec": state["W_dec"].bfloat16().float()}
        return load(self, state, *args, **kwargs)

    monkeypatch.setattr(SparseAutoencoder, "load_state_dict", rounded)
    found = resume(subject)
    assert found.passed is False
    assert found.values["wrong"] == 0
    assert found.values["largest_difference_of_weights"] > 0


@pytest.mark.parametrize("part", ["_bag_sum", "_sum_by_latent"])
def test_a_kernel_that_is_off_by_a_thousandth_is_found(
    part: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(sparse, part)
    monkeypatch.setattr(sparse, part, lambda *args: 1.001 * kernel(*args))
    found = kernels_float32(subject)
    assert found.passed is False
    assert max(found.values.values()) == pytest.approx(1e-3, rel=0.1)


def test_a_straight_through_gradient_that_is_off_by_a_thousandth_is_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = straight_through._over_rows
    monkeypatch.setattr(straight_through, "_over_rows", lambda *args: 1.001 * kernel(*args))
    found = kernels_float32(subject)
    assert found.passed is False
    assert [name for name, error in found.values.items() if error > 5e-4] == ["JumpReLU", "step function"]


def test_a_wrong_kernel_in_bfloat16_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = sparse._sum_by_latent
    monkeypatch.setattr(
        sparse, "_sum_by_latent", lambda code, sources, *rest: kernel(code, sources.flip(0), *rest)
    )
    assert kernels_bfloat16(subject).passed is False


def test_a_buffer_that_is_allocated_twice_is_found(wide: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, again = LiveStream._allocated, []

    def twice(self: LiveStream) -> list[Tensor]:
        if not self._buffers:
            again[:] = [torch.ones_like(buffer) for buffer in allocated(self)]
        return allocated(self)

    monkeypatch.setattr(LiveStream, "_allocated", twice)
    assert memory(wide).passed is False


@pytest.mark.slow
def test_a_copy_of_the_whole_buffer_is_found(wide: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives between two batches only."""
    served = LiveStream._served

    def copying(self: LiveStream, mixed: Any, epoch: int) -> Any:
        _ = self._buffers[0].clone()
        return served(self, mixed, epoch)

    monkeypatch.setattr(LiveStream, "_served", copying)
    assert memory(wide).passed is False


def diverging(rank: int, port: int, folder: str, kind: str, sizes: Sizes, texts: list[str]) -> None:
    ended = {"steps": sizes.steps, "weights": f"of rank {rank}"}
    ranks._result(folder, rank).write_text(json.dumps(ended))


def raising(rank: int, port: int, folder: str, kind: str, sizes: Sizes, texts: list[str]) -> None:
    if rank == 1:
        ranks._log(folder, rank).write_text("Traceback\nValueError: no such rank\n")
        sys.exit(3)
    time.sleep(600)


def hanging(rank: int, port: int, folder: str, kind: str, sizes: Sizes, texts: list[str]) -> None:
    time.sleep(600 * rank)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (diverging, "weights differ"),
        (raising, "rank 1 ended with 3: ValueError: no such rank"),
        (hanging, "[1] did not end within 1 s"),
    ],
)
def test_ranks_that_differ_fail_or_hang_are_found(work: Any, words: str, subject: Subject) -> None:
    found = two_ranks(
        replace(subject, sizes=replace(SMALL, rank_seconds=1.0 if work is hanging else 60.0)),
        start="fork",
        work=work,
    )
    assert found.passed is False
    assert words in found.figure


@contextmanager
def item_calls() -> Iterator[list[str]]:
    """Lists calls of `Tensor.item`, which wait on an accelerator."""
    found: list[str] = []
    item = Tensor.item

    def counted(self: Tensor) -> Any:
        found.append(training._innermost("elsewhere", 0))
        return item(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "item", counted)
        yield found


def test_a_wait_in_a_training_step_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(subject, item_calls).passed
    step = SparseAutoencoder.training_step

    def waiting(self: SparseAutoencoder, *args: Any) -> Tensor:
        loss = step(self, *args)
        loss.item()
        return loss

    monkeypatch.setattr(SparseAutoencoder, "training_step", waiting)
    found = waits(subject, item_calls)
    assert found.passed is False
    assert found.values["waits"] == found.values["steps"] == 2 * (SMALL.steps - training.WARM_UP)


def test_a_wait_in_the_stream_is_found_with_its_line(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deeplens_lightning.stream.loader.finish", lambda rows, scalings, dtype: waiting(rows)
    )

    def waiting(rows: dict[str, Tensor]) -> Tensor:
        (x,) = rows.values()
        x.sum().item()
        return x

    found = waits(subject, item_calls)
    assert found.passed is False
    assert found.values["places"][0].startswith("stream/loader.py:")


def test_torchs_warnings_about_waits_are_listed_and_others_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with cuda_waits() as found:
            for _ in range(2):
                warnings.warn(training.WAIT, UserWarning, stacklevel=1)
            warnings.warn("another", UserWarning, stacklevel=1)
        assert [str(one.message) for one in shown] == ["another"]
    assert len(found) == 2
    assert found[0].partition(":")[0] == __file__
    assert modes == ["default", "warn", "default"]


# ---- the command


def run(subject: Subject, checks: Any, **options: Any) -> bool:
    return command.run_checks(subject, checks, **options)


def test_the_figures_are_printed_and_written(
    subject: Subject,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "doctor.json"
    assert run(subject, [kernels_float32, waits, speed(False)], out=str(out))
    shown = capsys.readouterr().out
    for word in ("kernels", "passed", "not applicable", "below the target", "buy a faster one"):
        assert word in shown
    found = json.loads(out.read_text())
    assert found["passed"]
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert [one["name"] for one in found["checks"]] == ["kernels, float32", "waits", "speed"]
    assert [one["passed"] for one in found["checks"]] == [True, None, False]
    assert found["checks"][2]["values"] == {"ratio": 0.1}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_a_speed_fails_only_under_strict(strict: bool, fast: bool, subject: Subject) -> None:
    assert run(subject, [speed(fast)], strict=strict) == (fast or not strict)


def test_a_check_that_raises_fails_with_its_message_and_the_others_run(
    subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    @check("broken", target="none", advice="none")
    def broken(subject: Subject) -> Found:
        raise OSError("[no] such thing")

    assert not run(subject, [broken, speed(True)])
    shown = capsys.readouterr().out
    assert "[no] such thing" in shown
    assert "speed" in shown


def test_the_exit_code_is_1_if_a_check_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def done(subject: Subject, *options: Any) -> bool:
        asked.append((str(subject.device), subject.hf_model, subject.layer, subject.hook, *options))
        return len(asked) == 1

    monkeypatch.setattr(command, "run_checks", done)
    main(["doctor", "--device", "cpu", "--strict"])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--device=cpu", "--strict", "--layer", "2", f"--out={tmp_path / 'x.json'}"])
    assert ended.value.code == 1
    assert asked == [
        ("cpu", "demo:lm", None, None, command.CHECKS, None, True),
        ("cpu", "demo:lm", 2, None, command.CHECKS, str(tmp_path / "x.json"), True),
    ]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--device=cuda:7", r"no such device here; give one of cpu"),
        ("--device=gpu", r"no such device here; give one of cpu"),
        ("--layer=99", r"layers 0 to 5"),
        ("--hook=mlp_uot", r"mlp_out"),
        ("--hf_model=/no/such/folder", r"there is no such folder"),
        ("--out=/no/such/folder/x.json", r"make it first"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_check(option: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        main(["doctor", option])


def test_every_check_is_in_the_list_once() -> None:
    assert len({run.__name__ for run in command.CHECKS}) == len(command.CHECKS) == 10
    assert {"fidelity", "resume", "waits", "memory", "two_ranks"} <= {run.__name__ for run in command.CHECKS}


@pytest.mark.slow
def test_doctor_passes_on_this_cpu_in_a_real_process(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "deeplens_lightning",
        "doctor",
        "--device=cpu",
        f"--out={tmp_path / 'd.json'}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["name"]: one["passed"] for one in json.loads((tmp_path / "d.json").read_text())["checks"]}
    assert all(passed for name, passed in found.items() if name in ("resume", "memory", "two ranks"))
