"""What determines the rows is in checkpoints and caches alike; entries that earlier releases lack are unknown."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, CTRLTokenizer, PreTrainedTokenizerBase

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import ModelOptions
from deeplens_lightning.shards.errors import OtherConfigError
from deeplens_lightning.shards.format import ADDED_ENTRIES, Manifest
from deeplens_lightning.stream.row_identity import ABSENT, chat_template_digest, tokenizer_digest
from tests.support.models import save_model
from tests.support.recorder import assert_same, take
from tests.support.training import data, of_an_earlier_release

Tiny = Callable[[str], str]


def lower_case(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, which reads texts in lower case: other token ids, and the same special tokens."""
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_template(folder: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "tokenizer": lambda folder: {"tokenizer": lower_case(folder)},
    "chat_template": lambda folder: {"tokenizer": with_template(folder)},
    "attention": lambda folder: {"model_options": ModelOptions(kwargs={"attn_implementation": "eager"})},
    "compile": lambda folder: {"model_options": ModelOptions(compile=True)},
}


def opened(folder: str, **changes: Any) -> ActivationDataModule:
    dm = data(folder, **changes)
    dm.setup("fit")
    return dm


def manifest(dm: ActivationDataModule) -> Manifest:
    assert dm.live is not None
    return dm.live.extraction(None).manifest()


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_rows_is_refused_in_checkpoints_and_in_caches(tiny: Tiny, name: str) -> None:
    dm = opened(tiny("gpt2"))
    take(dm, 2)
    state, cache = deepcopy(dm.state_dict()), manifest(dm)
    dm.teardown("fit")
    other = opened(tiny("gpt2"), **CHANGES[name](tiny("gpt2")))
    with pytest.raises(ValueError, match=rf"\n  {name}: .* in the checkpoint, .* now\n") as error:
        other.load_state_dict(state)
    assert str(error.value).count(" in the checkpoint, ") == 1
    with pytest.raises(OtherConfigError, match=rf"\n  config\.{name}: .* there, .* here\n") as refused:
        manifest(other).check_same(Manifest.parse(cache.dump(), "acts"), "acts")
    assert str(refused.value).count(" there, ") == 1
    other.teardown("fit")


def test_every_entry_of_the_list_is_in_checkpoints_and_in_caches(tiny: Tiny) -> None:
    dm = opened(tiny("gpt2"))
    assert dm.live is not None
    listed, found, config = dm.live.identity, dm.live.fingerprint(), manifest(dm).config
    assert listed.items() <= dict(config).items()
    names = {name for name in listed if name not in ("model", "dataset", "packing")}
    names |= {f"model {name}" for name in listed["model"]} | listed["dataset"].keys()
    names |= listed["packing"].keys() - {"prefix", "suffix", "excluded"} | {"special tokens"}
    assert names <= found.keys()
    assert set(ADDED_ENTRIES) <= found.keys()
    json.dumps(config)
    dm.teardown("fit")


def test_a_checkpoint_of_an_earlier_release_resumes_bit_for_bit(tiny: Tiny) -> None:
    dm = opened(tiny("gpt2"))
    take(dm, 20)
    state = of_an_earlier_release(dm.state_dict())
    rest = take(dm, 10)
    dm.teardown("fit")
    again = opened(tiny("gpt2"))
    again.load_state_dict(state)
    assert_same(take(again, 10), rest)
    again.teardown("fit")


def test_a_cache_of_an_earlier_release_is_continued(tiny: Tiny) -> None:
    dm = opened(tiny("gpt2"))
    new = manifest(dm)
    dm.teardown("fit")
    old = replace(new, config={name: x for name, x in new.config.items() if name not in ADDED_ENTRIES})
    new.check_same(Manifest.parse(old.dump(), "acts"), "acts")
    with pytest.raises(OtherConfigError, match=r"config\.seed: None there, 0 here"):
        new.check_same(replace(old, config={k: v for k, v in old.config.items() if k != "seed"}), "acts")
    with pytest.raises(OtherConfigError, match=r"config\.tokenizer: .* there, None here"):
        old.check_same(new, "acts")


def test_a_tokenizer_is_its_content_and_not_its_path_or_its_last_call(tiny: Tiny, tmp_path: Path) -> None:
    one = AutoTokenizer.from_pretrained(tiny("gpt2"))
    wanted = tokenizer_digest(one)
    one.save_pretrained(tmp_path / "elsewhere")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "elsewhere")) == wanted
    one.pad_token = one.eos_token
    one(["a text", "a longer text of several tokens"], truncation=True, max_length=3, padding=True)
    assert one.backend_tokenizer.truncation is not None
    assert tokenizer_digest(one) == wanted
    assert tokenizer_digest(lower_case(tiny("gpt2"))) != wanted
    one.add_tokens(["of several"])
    assert tokenizer_digest(one) != wanted
    assert tokenizer_digest(None) == ABSENT


def slow(folder: Path, merges: str) -> PreTrainedTokenizerBase:
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab@@", "bc@@", "<unk>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_a_tokenizer_in_python_is_its_content_too(tmp_path: Path) -> None:
    first, same, other = (slow(tmp_path / str(i), merges) for i, merges in enumerate(("a b", "a b", "b c")))
    assert not first.is_fast
    assert tokenizer_digest(first) == tokenizer_digest(same) != tokenizer_digest(other)
    assert tokenizer_digest(ByT5Tokenizer()) == tokenizer_digest(ByT5Tokenizer())
    assert tokenizer_digest(ByT5Tokenizer()) != tokenizer_digest(ByT5Tokenizer(extra_ids=3))


def test_a_chat_template_is_its_content(tiny: Tiny) -> None:
    plain, one = AutoTokenizer.from_pretrained(tiny("gpt2")), with_template(tiny("gpt2"))
    assert chat_template_digest(None) == chat_template_digest(plain) == ABSENT
    wanted = chat_template_digest(one)
    assert wanted == chat_template_digest(with_template(tiny("gpt2"))) != ABSENT
    one.chat_template += " "
    assert chat_template_digest(one) != wanted


TOKENS = datasets.Dataset.from_dict({"text": [list(range(9)) for _ in range(40)]})


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")
    for path in folder.glob("*token*"):
        path.unlink()
    dm = opened(str(folder), dataset=TOKENS)
    assert dm.tokenizer is None
    assert dm.state_dict()["fingerprint"]["tokenizer"] == ABSENT
    take(dm, 2)
    dm.teardown("fit")
    with pytest.raises(ValueError, match="has no tokenizer"):
        data(str(folder)).setup("fit")


def too_large(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    return {}


def damaged(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text("{")
    return {}


def misspelt(folder: Path) -> dict[str, Any]:
    return {"tokenizer": str(folder / "nothing_here")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (too_large, "tokens, but the model's embedding has 600 rows"),
        (damaged, "the tokenizer of .* cannot be loaded"),
        (misspelt, "nothing_here"),
    ],
)
def test_token_ids_do_not_hide_a_tokenizer_that_does_not_fit(
    tmp_path: Path, spoil: Callable[[Path], dict[str, Any]], message: str
) -> None:
    folder = save_model(tmp_path, "gpt2")
    dm = data(str(folder), TOKENS, **spoil(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dm.setup("fit")
