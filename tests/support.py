"""Helpers of several test files: tokenizers, tiny models, rows in memory, chat templates, runs that are interrupted."""

import json
import random
import string
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import save_adapter
from accel_llm.backend.strategy import PRECISION_DTYPES, resolve_precision
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import Template, load_template
from accel_llm.chat.values import (
    BAD_WEIGHT,
    BROKEN_TOOLS,
    EMPTY_ANSWER,
    IMAGES,
    MISSING_VALUE,
    NOT_JSON,
    NOT_MESSAGES,
    NOT_TEXT,
    TWO_REASONINGS,
    UNKNOWN_ROLE,
)
from accel_llm.config.options import TrainOptions
from accel_llm.data.rows import ARRAYS, RowPart, Rows, as_rows
from accel_llm.model.loading import load_model
from accel_llm.model.placement import materialize_weights
from accel_llm.system.run_lock import release_locks
from accel_llm.system.signals import signal_requests

# The Markdown pages of the project.
ROOT = Path(__file__).parents[1]
PAGE_FOLDERS = ("accel_llm", "accelerate_configs", "launch", "tests")
PAGES = [ROOT / "README.md", *(page for name in PAGE_FOLDERS for page in sorted((ROOT / name).rglob("README.md")))]

# The special tokens of `character_tokenizer`, and the sizes of all tiny models.
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Options that several model families share.
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip

# Families of which several documents can share one row, with the options that `tiny_model` adds to SIZES.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": HEADS,
    "mistral": WINDOW,
    "gemma": HEADS,
    "gemma2": {**HEADS, **WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**HEADS, **WINDOW, "final_logit_softcapping": 3.0},
    "phi3": WINDOW,
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**WINDOW, "logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "gpt2": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "olmo2": {},
    "glm4": HEADS,
    "starcoder2": WINDOW,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {**HEADS, **WINDOW, **LOCAL_EXPERTS},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, **HEADS},
    "phi": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "granitemoe": {**LOCAL_EXPERTS, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "deepseek_v3": DEEPSEEK,
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "phimoe": LOCAL_EXPERTS,
    "exaone4": WINDOW,
    "ernie4_5": HEADS,
    "glm4_moe": {**EXPERTS, **HEADS, "n_routed_experts": 4, "first_k_dense_replace": 1},
}

# Families whose attention or state would mix packed documents.
UNPACKABLE: dict[str, dict] = {
    "stablelm": {},
    "falcon": {"num_kv_heads": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
}  # fmt: skip

# Families that keep the loss of transformers, and why.
UNFUSED_FAMILIES: dict[str, dict] = {
    "hyperclovax": {"logits_scaling": 2.0},  # multiplies where Granite divides, under the same name
    "recurrent_gemma": {"logits_soft_cap": 3.0},  # another name for the soft-cap
    "modernbert-decoder": {},  # a layer between the hidden states and the output projection
    "llama4_text": {
        **HEADS,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
    },  # no decoder under its base_model_prefix
}

# Models whose rotary embeddings depend on the length of the input.
SCALED = ["phi3 longrope", "phimoe longrope", "olmo3 longrope", "llama dynamic", "gemma3_text dynamic"]

# Conversations.
SINGLE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
MULTI = [*SINGLE, {"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "It is 4.\n\nSure."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *MULTI]
CONVERSATIONS = {"single": SINGLE, "multi": MULTI, "system": SYSTEM}

# Chat templates like the published ones, but shorter.
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = """\
{%- for message in messages %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content %}
{%- if message.role == 'assistant' and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- bos_token + system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant take turns!') }}{%- endif %}
{%- endfor %}"""
PHI3 = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
ZEPHYR = PHI3.replace("'<|end|>\\n'", "eos_token + '\\n'")
GEMMA = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
SOURCES = {
    "qwen2.5": QWEN25,
    "llama-3": LLAMA3,
    "mistral": MISTRAL,
    "phi-3": PHI3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "qwen3": QWEN3,
}
# The special tokens that each template needs.
CONTROL_TOKENS = {
    "qwen2.5": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "llama-3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "phi-3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}

# Parts of the conversations in BAD_MESSAGES and of the errors about them.
USER = {"role": "user", "content": "q"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
ROLES = (
    "system, developer, user, human, prompter, assistant, gpt, chatgpt, bing, bard, bot, chatbot, ai, model, "
    "function_call, tool_call, tool, observation, function, ipython, environment, tool_response, tool_result, "
    "tool_results, tool_output, function_response, function_result; columns: role:NAME=user (or system, assistant, "
    "tool) adds one"
)

# Steps of a run in the tests of checkpoints, and the step at which it is interrupted.
STEPS, STOP = 6, 3


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each printable ASCII character, so that tests can count ids by hand."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def materialize(model: Any, options: Any) -> Any:
    """Read, cast and quantize the weights, as `place_weights` does in one process. Return the model."""
    compute = PRECISION_DTYPES[resolve_precision(options)]
    materialize_weights(model, list(model.modules()), compute, torch.device("cpu"))
    return model


def moved_adapter(base: Path, folder: Path, seed: int = 0, by: float = 0.05, **options: Any) -> Any:
    """Save an adapter whose weights moved away from their first values, as in training; return the model with it."""
    settings = TrainOptions(**{"model_name_or_path": str(base), "packing": False} | options)
    torch.manual_seed(seed)
    model = materialize(attach_adapter(load_model(settings), settings), settings)
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in state.values():
            parameter.add_(torch.randn_like(parameter) * by)
    save_adapter(model, folder, {name: parameter.detach().clone() for name, parameter in state.items()}, str(base))
    return model


def relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def make_rows(encoded: Iterable[tuple[int, list[int], list[int]]], weights: list[list[float]] | None = None) -> Rows:
    """Build rows in memory from (row number, ids, labels)."""
    part = RowPart()
    for k, (number, ids, labels) in enumerate(encoded):
        part.add(array("i", ids), array("i", labels), weights[k] if weights else None, number, 0, number)
    arrays = {name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}
    return as_rows(arrays, [(0, "rows")])


def reset() -> None:
    """Reset the state that a new process would not have: Accelerate's (it is kept in classes), locks, signals and seeds."""
    release_locks()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    signal_requests.stop, signal_requests.save = 0, False
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def tiny_model(family: str, **options) -> PreTrainedModel:
    """Return a float32 model with random weights so large that each part of the model changes the logits."""
    sizes = {**FAMILIES, **UNPACKABLE, **UNFUSED_FAMILIES, "jetmoe": {}}[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **sizes, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.2)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def turn_vectors(monkeypatch: Any) -> None:
    """Let torch decompose matrices as another processor may do it: each second pair of vectors has the other signs."""
    svd, eigh, qr = torch.linalg.svd, torch.linalg.eigh, torch.linalg.qr

    def signs(count: int) -> torch.Tensor:
        return 1.0 - 2 * (torch.arange(count) % 2)

    def turned_svd(matrix: torch.Tensor, full_matrices: bool = True, **settings: Any) -> Any:
        left, values, right = svd(matrix, full_matrices, **settings)
        return left * signs(left.shape[-1]), values, right * signs(right.shape[-2])[:, None]

    def turned_eigh(matrix: torch.Tensor) -> Any:
        values, vectors = eigh(matrix)
        return values, vectors * signs(len(values))

    def turned_qr(matrix: torch.Tensor, mode: str = "reduced") -> Any:
        q, r = qr(matrix, mode)
        return q * signs(q.shape[-1]), r * signs(len(r))[:, None]

    for name, function in (("svd", turned_svd), ("eigh", turned_eigh), ("qr", turned_qr)):
        monkeypatch.setattr(torch.linalg, name, function)


def saved_bases(tmp_path_factory: Any, families: Iterable[str]) -> dict[str, Path]:
    """Save a small model of each family; return their folders."""
    folder = tmp_path_factory.mktemp("bases")
    for family in families:
        tiny_model(family).save_pretrained(folder / family)
    return {family: folder / family for family in families}


def scaled_model(kind: str, length: int = 8) -> PreTrainedModel:
    """Return a tiny model that rotates documents of more than `length` tokens in another way; see SCALED."""
    plain = {"rope_type": "default", "rope_theta": 1000.0}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0}
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 5.0, 9.0, 12.0], "attention_factor": 1.2}
    longrope = {"rope_type": "longrope", **factors, "original_max_position_embeddings": length, "rope_theta": 1000.0}
    layers = {"layer_types": ["full_attention", "sliding_attention"], **WINDOW}
    phi = {"original_max_position_embeddings": length, "sliding_window": None}
    options = {
        "phi3 longrope": {**phi, "rope_parameters": longrope},
        "phimoe longrope": {**phi, "rope_parameters": {**longrope, "short_mscale": 1.1, "long_mscale": 1.3}},
        "olmo3 longrope": {**layers, "rope_parameters": {"full_attention": longrope, "sliding_attention": plain}},
        "llama dynamic": {"rope_parameters": dynamic, "max_position_embeddings": length},
        "gemma3_text dynamic": {
            **layers,
            "rope_parameters": {"full_attention": dynamic, "sliding_attention": plain},
            "max_position_embeddings": length,
        },
    }[kind]
    return tiny_model(kind.split()[0], **options)


def random_rows(number: int, longest: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(2, longest + 1, number):
        ids = rng.integers(3, 97, length)
        rows.append((ids, np.where(rng.random(length) < 0.6, ids, IGNORED)))
    return rows


def byte_level(control_tokens: list[str], **options: object) -> PreTrainedTokenizerFast:
    """Return a tiny GPT-2-like tokenizer. It merges line ends and spaces with the next characters, as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", *control_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant\n\nHello. It is 4.\n\nSure.  Hi\n\n\nHi"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def sentence_piece_like(control_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Return a tiny Llama-2-like tokenizer: a space before the text, bytes for unknown characters, no word borders."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *control_tokens, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant Hello. It is 4. Sure. Hi system | < >"] * 4, trainer)
    # The trainer takes bytes only as special tokens, but they belong to the model alone.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def load_source(tokenizer: PreTrainedTokenizerFast, source: str, tmp_path: Path) -> Template:
    path = tmp_path / "template.jinja"
    path.write_text(source, encoding="utf-8")
    return load_template(tokenizer, str(path))


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **fields}


class Stopped(BaseException):
    """Simulates a killed process."""


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def metrics(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without measured values (speed, memory)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_mb")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(path)


def equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "flipped":
        path.write_bytes(data[:1] + bytes([data[1] ^ 1]) + data[2:])
    else:
        path.unlink()
        path.mkdir()


# Name: a `messages` value, the error about it, and the reason under which the row is counted.
BAD_MESSAGES: dict[str, tuple[Any, str, str]] = {
    "no list": (7, "messages: found 7; needs a list of messages that is not empty", NOT_MESSAGES),
    "null": (None, "messages: found null; needs a list of messages that is not empty", NOT_MESSAGES),
    "an empty list": ([], "messages: found []; needs a list of messages that is not empty", NOT_MESSAGES),
    "text": (
        "hi",
        'messages: found "hi", which is not JSON (Expecting value: line 1 column 1 (char 0))',
        NOT_JSON,
    ),
    "a turn that is text": (
        ["hi"],
        'messages[0]: found "hi"; needs an object with role and content',
        NOT_MESSAGES,
    ),
    "unknown role": (
        [USER, {"from": "narrator", "value": "x"}],
        f'messages[1].from: unknown role "narrator"; known are {ROLES}',
        UNKNOWN_ROLE,
    ),
    "a role that is no text": (
        [{"role": ["user"], "content": "x"}],
        f'messages[0].role: unknown role ["user"]; known are {ROLES}',
        UNKNOWN_ROLE,
    ),
    "no role": (
        [{"content": "x"}],
        f"messages[0].role: missing (its keys: content); known are {ROLES}",
        UNKNOWN_ROLE,
    ),
    "no content": (
        [{"role": "user"}],
        "messages[0].content: missing; needs text (its keys: role)",
        MISSING_VALUE,
    ),
    "null content": (
        [{"from": "human", "value": None}],
        "messages[0].value: found null; needs text (its keys: from, value)",
        MISSING_VALUE,
    ),
    "a null call": (
        [{"from": "function_call", "value": None}],
        "messages[0].value: found null; needs text (its keys: from, value)",
        MISSING_VALUE,
    ),
    "a number": (
        [USER, {"role": "assistant", "content": 3.3}],
        "messages[1].content: found 3.3; needs text (its keys: role, content)",
        NOT_TEXT,
    ),
    "an object": (
        [{"role": "tool", "content": {"age": 31}}],
        'messages[0].content: found {"age": 31}; needs text (its keys: role, content)',
        NOT_TEXT,
    ),
    "half a pair": (
        [{"human": "q", "assistant": None}],
        "messages[0].assistant: found null; needs text (its keys: human, assistant)",
        MISSING_VALUE,
    ),
    "an empty answer in a pair": (
        [{"human": "q", "assistant": " "}],
        "messages[0].assistant: the answer is empty; needs text (its keys: human, assistant)",
        EMPTY_ANSWER,
    ),
    "an empty answer": (
        [USER, {"from": "gpt", "value": " \n"}],
        "messages[1].value: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "an answer of reasoning alone": (
        [assistant(content="", reasoning_content="t")],
        "messages[0].content: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "an answer of no parts": (
        [assistant(content=[])],
        "messages[0].content: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "reasoning that is no text": (
        [assistant(thinking=0)],
        "messages[0].thinking: found 0; needs text (its keys: role, content, thinking)",
        NOT_TEXT,
    ),
    "two reasonings": (
        [assistant(thinking="t", reasoning_content="s")],
        "messages[0].reasoning_content: has several different reasoning texts; only one is allowed (its keys: role, "
        "content, thinking, reasoning_content)",
        TWO_REASONINGS,
    ),
    "a part that is text": (
        [{"role": "user", "content": ["q"]}],
        'messages[0].content[0]: found "q"; needs an object with type and text',
        NOT_TEXT,
    ),
    "a part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text: missing; needs text (its keys: type)",
        MISSING_VALUE,
    ),
    "an unknown part": (
        [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}],
        'messages[0].content[0].type: found "refusal"; allowed: text, reasoning, tool_call',
        NOT_TEXT,
    ),
    "an image": (
        [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {}}]}],
        'messages[0].content[1].type: found "image_url", but this program trains on text alone',
        IMAGES,
    ),
    "no calls, and no text either": (
        [assistant(content=None, tool_calls=[])],
        "messages[0].content: found null; needs text (its keys: role, content, tool_calls)",
        MISSING_VALUE,
    ),
    "no calls as JSON text, and no text either": (
        [{"role": "user", "content": None, "tool_calls": "[]"}],
        "messages[0].content: found null; needs text (its keys: role, content, tool_calls)",
        MISSING_VALUE,
    ),
    "a turn of no calls": (
        [{"from": "function_call", "value": "[]"}],
        "messages[0].value: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "arguments that are a number": (
        [assistant(tool_calls=[{"name": "f", "arguments": 0}])],
        'messages[0].tool_calls: found the tool call {"name": "f", "arguments": 0}; needs an object with name and '
        "arguments (an object)",
        BROKEN_TOOLS,
    ),
    "a call that is not JSON": (
        [{"from": "function_call", "value": "add(1)"}],
        'messages[0].value: found "add(1)", which is not JSON (Expecting value: line 1 column 1 (char 0))',
        NOT_JSON,
    ),
    "a call without a name": (
        [{"from": "function_call", "value": "{}"}],
        "messages[0].value: found the tool call {}; needs an object with name and arguments (an object)",
        BROKEN_TOOLS,
    ),
    "a call that is a number": (
        [assistant(tool_calls=7)],
        "messages[0].tool_calls: found the tool call 7; needs an object with name and arguments (an object)",
        BROKEN_TOOLS,
    ),
    "arguments that are a list": (
        [assistant(tool_calls=[{"name": "f", "arguments": [1]}])],
        'messages[0].tool_calls: found the tool call {"name": "f", "arguments": [1]}; needs an object with name and '
        "arguments (an object)",
        BROKEN_TOOLS,
    ),
    "a user who calls": (
        [{**USER, "tool_calls": [CALL]}],
        "messages[0].tool_calls: found in a user turn; only an assistant turn can call tools",
        BROKEN_TOOLS,
    ),
    "an id that is no text": (
        [{"role": "tool", "content": "1", "tool_call_id": 0}],
        "messages[0].tool_call_id: found 0; needs text (its keys: role, content, tool_call_id)",
        NOT_TEXT,
    ),
    "train that is no truth value": (
        [assistant(train="false")],
        'messages[0].train: found "false"; allowed: true and false (context only)',
        BAD_WEIGHT,
    ),
    "a negative weight": (
        [assistant(weight=-1)],
        "messages[0].weight: found -1; needs a number from 0 (context only) upwards",
        BAD_WEIGHT,
    ),
    "no number as weight": (
        [assistant(weight=float("nan"))],
        "messages[0].weight: found NaN; needs a number from 0 (context only) upwards",
        BAD_WEIGHT,
    ),
    "an infinite weight": (
        [assistant(loss_weight=float("inf"))],
        "messages[0].loss_weight: found Infinity; needs a number from 0 (context only) upwards",
        BAD_WEIGHT,
    ),
    "a weight beyond all floats": (
        [assistant(weight=10**400)],
        f"messages[0].weight: found 1{'0' * 76}...; needs a number from 0 (context only) upwards",
        BAD_WEIGHT,
    ),
    "a truth value as weight": (
        [assistant(weight=True)],
        "messages[0].weight: found true; needs a number from 0 (context only) upwards",
        BAD_WEIGHT,
    ),
}
