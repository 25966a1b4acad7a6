"""Positions: the limit that a config states, and rotary embeddings that follow each document's own length."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import GPT, SCALED, SIZES, make_rows, scaled_model, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.errors import ConfigError
from accel_llm.model.attention import enable_packing, forward_arguments
from accel_llm.model.generation import pad_left
from accel_llm.model.loading import build_model, load_complete_model, load_model_config
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.positions import position_limit, scale_by_document
from accel_llm.training.evaluation import mean_loss

LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "type": "longrope"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What the published config.json says of positions, and the limit that its model card states.
PUBLISHED = {
    "Qwen2.5-7B-Instruct": ("qwen2", {"max_position_embeddings": 32768}, 32768),
    "Qwen2.5-7B-Instruct with YaRN": (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Qwen3-8B with YaRN": (
        "qwen3",
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Llama-3.1-8B": (
        "llama",
        {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        131072,
    ),
    "Llama-3.2-1B": (
        "llama",
        {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3}},
        131072,
    ),
    "Phi-3-mini-128k": (
        "phi3",
        {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": LONG},
        131072,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        },
        163840,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        },
        131072,
    ),
    "gemma-3-4b text": (
        "gemma3_text",
        {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        131072,
    ),
    "vicuna-7b-v1.5-16k": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384,
    ),
    "a Llama with dynamic NTK": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        8192,
    ),
    "gpt2": ("gpt2", {"n_positions": 1024, "n_ctx": 1024}, 1024),
    "opt-125m": ("opt", {"max_position_embeddings": 2048}, 2048),
    "roberta-base": ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    "mpt-7b": ("mpt", {"max_seq_len": 2048}, 2048),
    "whisper": ("whisper", {"max_target_positions": 448}, 448),
    "bloom-560m": ("bloom", {}, None),
    "mamba-130m": ("mamba", {}, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_limit_is_the_one_of_the_model_card(name, tmp_path):
    family, settings, limit = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **settings}), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert position_limit(config) == limit
    if limit:
        options = TrainOptions(model_name_or_path=str(tmp_path), output_dir="out")
        assert load_model_config(options, limit).model_type == family
        with pytest.raises(ConfigError) as error:
            load_model_config(options, limit + 1)
        assert str(error.value) == (
            f"max_length: {limit + 1} is beyond the model's {limit} positions; set max_length to {limit} or less."
        )


LEARNED = {
    "gpt2": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "biogpt": {},
    "bart": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
    "roberta": {"is_decoder": True, "pad_token_id": 1},
    "xlm-roberta": {"is_decoder": True, "pad_token_id": 0},
    "bert": {"is_decoder": True},
}


@pytest.mark.parametrize("family", LEARNED)
def test_where_positions_are_learned_the_limit_is_the_longest_input(family):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **LEARNED[family]})).eval()
    limit = position_limit(model.config)
    assert limit is not None and 61 < limit <= 64
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Lengths on both sides of 8 tokens, the limit itself, the longest in the middle, an equal length far apart."""
    rng = np.random.default_rng(0)
    return [(ids := rng.integers(3, 97, n), ids) for n in (5, 12, 8, 9, 17, 3, 12)]


def new_model(kind: str) -> PreTrainedModel:
    """A model in float64, where torch can multiply the matrices of its experts in it."""
    model = scaled_model(kind)
    return model if kind.startswith("phimoe") else model.double()


@torch.no_grad()
def alone(kind: str, ids: np.ndarray) -> torch.Tensor:
    """Logits of one document as the first input of a new model, in plain transformers."""
    return new_model(kind)(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]


@pytest.mark.parametrize("how", ["packed", "padded", "one after another"])
@pytest.mark.parametrize("kind", SCALED)
def test_each_document_is_computed_by_its_own_length(kind, how):
    rows, differences = documents(), []
    expected = [alone(kind, ids) for ids, _ in rows]
    for as_if_alone in (True, False):
        model = new_model(kind)
        if as_if_alone:
            scale_by_document(model)
        with torch.no_grad():
            if how == "one after another":
                outputs = [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids, _ in rows]
            elif how == "padded":
                logits = model(**forward_arguments(collate_padded(rows, 0)), use_cache=False).logits
                outputs = [row[: len(ids)] for row, (ids, _) in zip(logits, rows, strict=True)]
            else:
                enable_packing(model)
                logits = model(**forward_arguments(collate_packed(rows)), use_cache=False).logits[0]
                outputs = logits.split([len(ids) for ids, _ in rows])
        pairs = zip(outputs, expected, strict=True)
        differences.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert differences[0] < 1e-6
    # What transformers does: only LongRoPE forgets the document before.
    assert differences[1] > 1e-2 or (how == "one after another" and "longrope" in kind)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", SCALED)
def test_loss_and_gradients_are_the_sum_over_documents_alone(kind, packed):
    """With gradient checkpointing, after a long document."""
    rows = documents()
    expected = {name: torch.zeros_like(parameter) for name, parameter in new_model(kind).named_parameters()}
    total = 0.0
    for ids, _ in rows:
        single = new_model(kind)
        logits = single(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum")
        loss.backward()
        total += float(loss.detach())
        for name, parameter in single.named_parameters():
            expected[name] += 0 if parameter.grad is None else parameter.grad

    model = scaled_model(kind)
    scale_by_document(model)
    if packed:
        enable_packing(model)
    attach_loss(model, 1024)
    model.to(next(iter(expected.values())).dtype)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train(not kind.startswith("phimoe"))  # whose router draws experts at random in training
    batch = collate_packed(rows) if packed else collate_padded(rows, 0)
    for _ in range(2):
        model.zero_grad()
        loss = next_token_loss(model, batch)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["phi3 longrope", "llama dynamic"])
def test_evaluation_does_not_move_with_the_batch(kind, packing, accelerator):
    rows = documents()
    total = 0.0
    for ids, _ in rows:
        total += float(F.cross_entropy(alone(kind, ids)[:-1], torch.from_numpy(ids[1:]), reduction="sum"))
    expected = total / sum(len(ids) - 1 for ids, _ in rows)

    model = scaled_model(kind)
    scale_by_document(model)
    if packing:
        enable_packing(model)
    attach_loss(model, 20)
    encoded = make_rows([(k, ids.tolist(), [-100, *ids[1:].tolist()]) for k, (ids, _) in enumerate(rows)])
    for size in (1, 2, 7):
        options = TrainOptions(packing=packing, max_length=20, per_device_eval_batch_size=size)
        assert mean_loss(accelerator, model, encoded, options, 0)["eval/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", SCALED)
def test_answers_do_not_depend_on_the_other_prompts(kind):
    """Prompts of one batch on both sides of the limit of 8 tokens, padded on the left."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 97, n) for n in (3, 12, 10, 15)]
    settings = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    device = torch.device("cpu")
    expected = []
    for prompt in prompts:
        expected.append(
            scaled_model(kind).generate(**pad_left([prompt], 0, device), generation_config=settings)[0, -4:]
        )
    model = scaled_model(kind)
    scale_by_document(model)
    for _ in range(2):
        answers = model.generate(**pad_left(prompts, 0, device), generation_config=settings)[:, -4:]
        assert answers.tolist() == [answer.tolist() for answer in expected]


def test_models_come_from_their_files_and_configs_as_if_alone(tmp_path):
    plain = scaled_model("llama dynamic")
    plain.save_pretrained(tmp_path)
    rows = documents()
    loaded = load_complete_model(str(tmp_path), dtype=torch.float32).eval()
    batch = collate_padded(rows, 0)
    with torch.no_grad():
        logits = loaded(**forward_arguments(batch), use_cache=False).logits
    for row, (ids, _) in zip(logits, rows, strict=True):
        expected = alone("llama dynamic", ids)
        assert (row[: len(ids)] - expected).norm() <= 1e-5 * expected.norm()

    options = TrainOptions(model_name_or_path=str(tmp_path), output_dir="out", packing=False, max_length=20)
    built = build_model(plain.config, options)
    assert "_rotate_by_document" in repr(built.model.rotary_emb.forward.__func__.__code__)


def test_other_models_stay_as_they_are():
    for family in ("llama", "gpt2", "gpt_oss"):
        model = tiny_model(family)
        scale_by_document(model)
        assert not model._forward_pre_hooks
        assert all("forward" not in vars(module) for module in model.modules())
