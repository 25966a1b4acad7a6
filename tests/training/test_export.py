"""Exported models and adapters: complete, in the dtype of the base, with the template's end of turn as end token."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from support import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

from accel_llm.chat.template_source import CHATML
from accel_llm.config.options import TrainOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.model.generation import build_generation_config, stop_token_ids
from accel_llm.model.loading import load_model
from accel_llm.model.stored_dtypes import StoredDtypes
from accel_llm.training import export

TOKENIZER_FILES = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
MODEL_FILES = sorted(["config.json", "model.safetensors", *TOKENIZER_FILES])
ADAPTER_FILES = sorted(["adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES])


@pytest.fixture
def train(script, chats, tmp_path) -> Callable[..., Path]:
    def run(model: Path, *more: object, files: Path = chats) -> Path:
        where = ("--model_name_or_path", model, "--train_files", files, "--output_dir", tmp_path / "out")
        script("sft", *where, "--max_steps", 2, "--learning_rate", 1e-2, "--max_length", 128, *more)
        return tmp_path / "out"

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "README.md")


def test_an_adapter_is_complete_and_loads_by_itself(train, tiny):
    folder = train(tiny, "--method", "lora") / "adapter"
    assert names(folder) == ADAPTER_FILES
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    state = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert sum("lora_B" in name and bool(p.any()) for name, p in loaded.named_parameters()) == 14
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_complete_and_in_the_dtype_of_its_base(train, make_model, tmp_path, tied, dtype):
    base = make_model(tmp_path / "base", dtype, tie_word_embeddings=tied)
    folder = train(base, "--method", "full") / "model"
    assert names(folder) == MODEL_FILES
    state, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert state.keys() == before.keys() and ("lm_head.weight" in state) == (not tied)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert any(not torch.equal(state[name], before[name]) for name in state)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    configs = [json.loads((path / "config.json").read_text()) for path in (base, folder)]
    assert configs[0] == {key: configs[1][key] for key in configs[0]}  # beside them names of transformers 4


@pytest.mark.parametrize("named", [None, "float32"])
def test_the_files_decide_the_dtypes_and_not_what_config_json_says(train, make_model, tmp_path, named):
    """A config without a dtype, or with that of somebody's training; norms that were kept in float32 stay so."""
    base = make_model(tmp_path / "base", torch.bfloat16)
    settings = json.loads((base / "config.json").read_text()) | {"dtype": named}
    (base / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value}))
    file = base / "model.safetensors"
    state = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    folder = train(base, "--method", "full") / "model"
    exported = load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in exported.items()} == {name: t.dtype for name, t in state.items()}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16  # in which most bytes are


def test_files_of_a_base_model_have_no_prefix(tmp_path):
    """GPT-2 is published as `wte.weight`, and is `transformer.wte.weight` in the causal LM."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    state = {
        name: tensor.half() if "ln_" in name else tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    stored = StoredDtypes(TrainOptions(model_name_or_path=str(tmp_path)), model.config)
    cast = stored.cast(model, dict(model.named_parameters()))
    assert stored.main == torch.float32
    assert {name for name, tensor in cast.items() if tensor.dtype == torch.float16} == {n for n in cast if "ln_" in n}


def test_checkpointing_and_packing_leave_no_trace_in_the_config(train, make_model, tmp_path):
    base = make_model(tmp_path / "base")
    folder = train(base, "--method", "full", "--gradient_checkpointing") / "model"
    settings = json.loads((folder / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    assert settings["use_cache"] is True and before == {key: settings[key] for key in before}
    assert AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "sdpa"


def test_generation_ends_with_the_turn_first(train, make_model, tmp_path):
    base = make_model(tmp_path / "base", eos_token_id=[7, 9])
    generation = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [7, 9],
        "repetition_penalty": 1.1,
    }
    (base / "generation_config.json").write_text(json.dumps(generation))
    settings = GenerationConfig.from_pretrained(train(base) / "adapter")
    # <|im_end|> is 2, <|endoftext|> 0. Sampling values of a model that does not sample cannot be saved.
    assert settings.eos_token_id == [2, 7, 9] and settings.pad_token_id == 0
    assert settings.repetition_penalty == 1.1 and settings.temperature is None


def test_one_stop_id_is_a_number(train, tiny):
    assert GenerationConfig.from_pretrained(train(tiny) / "adapter").eos_token_id == 2


def test_a_chosen_template_is_saved_and_its_end_stops(train, make_model, tmp_path):
    base = make_model(tmp_path / "base", eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    folder = train(base, "--chat_template", "chatml") / "adapter"
    saved = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]


def test_without_stop_tokens_the_config_has_none(tiny):
    model = load_model(TrainOptions(model_name_or_path=str(tiny), packing=False))
    tokenizer = build_demo_tokenizer()
    assert build_generation_config(model, tokenizer, []).eos_token_id is None
    assert build_generation_config(model, tokenizer, [5]).eos_token_id == 5
    model.generation_config.eos_token_id = [9, 2]
    assert stop_token_ids(model, tokenizer, 4) == [4, 9, 2]
    assert stop_token_ids(model, tokenizer, None) == [9, 2]


def test_buffers_that_are_part_of_the_model_are_written(tmp_path):
    """DeepSeek-V3 keeps the bias of its expert choice in a buffer; a file without it loads as zeros."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "q_lora_rank": 8}
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
    heads = {
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 0,
    }
    config = DeepseekV3Config(num_hidden_layers=1, num_key_value_heads=2, **shape, **experts, **heads)
    model = DeepseekV3ForCausalLM(config)
    model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(0.7)
    state = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    export._save_model(model, tmp_path, export._model_state(model, state), torch.bfloat16)
    loaded, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and loaded.dtype == torch.bfloat16
    assert torch.allclose(loaded.model.layers[0].mlp.gate.e_score_correction_bias.float(), torch.tensor(0.7), atol=1e-2)
