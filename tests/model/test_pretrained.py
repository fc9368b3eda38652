import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer, locate, max_positions
from tests.support.model_families import randomised, tiny_config, tiny_model

TOKENS = torch.arange(10, 22)[None]


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def write_gguf(path: Path, config: LlamaConfig) -> None:
    """Write a GGUF file with Llama's architecture, random weights and a tokenizer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = ["<|endoftext|>", "w", "0"]
    writer.add_token_list([*words, *(f"w{index}" for index in range(config.vocab_size - len(words)))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    d, f = config.hidden_size, config.intermediate_size
    shapes = {"token_embd": (config.vocab_size, d), "output_norm": (d,), "output": (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        block = {
            "attn_norm": (d,),
            "ffn_norm": (d,),
            "ffn_gate": (f, d),
            "ffn_up": (f, d),
            "ffn_down": (d, f),
        }
        block |= {f"attn_{part}": (d, d) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.15 * torch.randn(shape, generator=generator)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_with_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_config("llama", num_key_value_heads=4))
    config = load_config(str(path))
    assert (config.num_hidden_layers, config.hidden_size) == (3, 32)
    assert len(load_tokenizer(str(path), config=config)) == 97
    whole = AutoModel.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = whole(TOKENS, output_hidden_states=True).hidden_states[2]
    points = resolve(config, 1, "resid_post")
    for name, kwargs in ((str(path), {}), (str(tmp_path), {"gguf_file": "tiny.gguf"})):
        frozen = FrozenModel.load(name, points, device="cpu", model_kwargs={"dtype": torch.float32, **kwargs})
        torch.testing.assert_close(frozen.activations(TOKENS)["layers.1.resid_post"], expected)
        assert len(frozen.base.layers) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attn_implementation_is_passed_to_the_model(attention: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    points = resolve(model.config, 1, "resid_mid")
    frozen = FrozenModel.load(
        str(tmp_path),
        points,
        device="cpu",
        model_kwargs={"attn_implementation": attention},
        isolation="auto"
        if attention != "flex_attention"
        else "packed",  # flex_attention compiles for each shape, so a probe is slow
    )
    assert frozen.base.config._attn_implementation == attention
    assert frozen.isolation == "packed"
    expected = FrozenModel.load(model, points, device="cpu").activations(TOKENS)
    torch.testing.assert_close(frozen.activations(TOKENS), expected)


def test_model_kwargs_choose_dtype_and_change_the_configuration(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    kwargs = {"dtype": "bfloat16", "layer_norm_epsilon": 1e-3}
    config = load_config(str(tmp_path), kwargs)
    assert config.layer_norm_epsilon == 1e-3
    frozen = FrozenModel.load(str(tmp_path), resolve(config, 1, "mlp_out"), device="cpu", model_kwargs=kwargs)
    assert frozen.base.config.layer_norm_epsilon == 1e-3
    assert frozen.dtypes == {"layers.1.mlp_out": torch.bfloat16}
    assert frozen.identity["dtype"] == "torch.bfloat16"


def test_a_device_map_decides_the_device(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    points = resolve(model.config, 1, "mlp_out")
    frozen = FrozenModel.load(str(tmp_path), points, device="meta", model_kwargs={"device_map": "cpu"})
    assert frozen.device.type == "cpu"
    assert frozen.activations(TOKENS)["layers.1.mlp_out"].device.type == "cpu"


def test_loading_draws_no_random_number_and_logs_no_load_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    capsys.readouterr()
    FrozenModel.load(str(tmp_path), resolve(model.config, 0, "mlp_out"), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "LOAD REPORT" not in caplog.text + "".join(capsys.readouterr())


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    FrozenModel.load(str(tmp_path), resolve(model.config, 0, "mlp_out"), device="cpu")
    with pytest.raises(ValueError, match=r"lacks 1 weights .* 'layers\.1\.mlp\.up_proj\.weight'"):
        FrozenModel.load(str(tmp_path), resolve(model.config, 1, "mlp_out"), device="cpu")


def test_a_quantised_model_that_cannot_run_here_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = randomised(AutoModel.from_config(tiny_config("llama")))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "c4"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = load_config(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"is quantised and cannot run on cpu: .*; give the unquantised model"
    ):
        FrozenModel.load(str(tmp_path), resolve(config, 1, "mlp_out"), device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "'./nowhere': there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("nowhere.gguf", "there is no such file"),
        ("demo:llm", "the embedded model is 'demo:lm'"),
        ("{empty}", "is a folder without config.json; give a folder that save_pretrained"),
    ],
)
def test_the_error_for_a_missing_model_contains_its_name(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_config(name.format(empty=tmp_path))


def test_the_error_for_a_model_that_is_not_on_the_hub_contains_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="'no/such-model' is no local folder and cannot be loaded from the hub"
    ):
        load_config("no/such-model")


def test_the_demo_is_a_folder_of_the_package() -> None:
    name, kwargs = locate("demo:lm", {"dtype": "float32"})
    assert Path(name).name == "lm"
    assert kwargs == {"dtype": "float32"}


def test_a_tokenizer_is_taken_from_the_model_a_folder_or_an_object(tmp_path: Path) -> None:
    given = tokenizer_of(97)
    assert load_tokenizer("gpt2", given) is given
    given.save_pretrained(tmp_path)
    assert len(load_tokenizer("gpt2", str(tmp_path))) == 97
    tiny_model("gpt2").save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 97
    loaded = AutoModel.from_pretrained(tmp_path)
    assert len(load_tokenizer(loaded, config=loaded.config)) == 97


def test_the_error_for_a_model_without_a_tokenizer_says_what_to_give(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no tokenizer .*; give tokenizer= a folder, a hub id or a tokenizer"
    ):
        load_tokenizer(str(tmp_path))
    built = AutoModel.from_config(tiny_config("gpt2"))
    with pytest.raises(ValueError, match="built from a configuration and has no tokenizer; give tokenizer="):
        load_tokenizer(built)


def test_a_vocabulary_beyond_the_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="has 98 tokens, but the model's embedding has 97 rows"):
        load_tokenizer("gpt2", tokenizer_of(98), config=tiny_config("gpt2"))


@pytest.mark.parametrize(
    ("family", "positions"),
    [("gpt2", 64), ("llama", 64), ("roberta", 62), ("mpt", 64), ("bloom", None), ("t5", None)],
)
def test_max_positions_of_each_kind_of_position_embedding(family: str, positions: int | None) -> None:
    config = tiny_config(family)
    if family in ("bloom", "t5", "mpt"):
        del config.max_position_embeddings  # all tiny configurations have it, but not these architectures
    assert max_positions(config) == positions
