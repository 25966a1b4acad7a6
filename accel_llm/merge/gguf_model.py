"""The form of a model in a GGUF file: settings, names of the weights, and the order of their rows.

The families are those that llama.cpp calls llama, qwen2 and qwen3. Whatever the file could not say is refused.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from accel_llm.errors import ConfigError

# For each family the linear layers with a bias, and whether queries and keys of a head are normalized.
GGUF_FAMILIES = {"llama": ((), False), "qwen2": (("q_proj", "k_proj", "v_proj"), False), "qwen3": ((), True)}
ATTENTION_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
FEED_FORWARD_NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NORM_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORM_NAMES = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
ROTATION_FACTORS = "rope_freqs.weight"
YARN_SETTINGS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


class GgufWeight(NamedTuple):
    """One weight: its name in the GGUF file, and the number of heads whose rows change their order (0: none)."""

    name: str
    heads: int = 0


def check_family(config: PreTrainedConfig, folder: object) -> None:
    """Check that a GGUF file can say all that `config` says.

    Raises:
        ConfigError: it belongs to another family, or has a setting that the file has no place for.
    """
    scaling = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    kind = scaling.get("rope_type", "default")
    windows = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    reason = ""
    if config.model_type not in GGUF_FAMILIES:
        reason = f"the family {config.model_type} is not written, only {', '.join(GGUF_FAMILIES)}"
    elif getattr(config, "quantization_config", None):
        reason = (
            "its weights are quantized already; merge its adapter with --merge_base dequantized, or name the original"
        )
    elif getattr(config, "hidden_act", "silu") != "silu":
        reason = f"hidden_act is {config.hidden_act}, and llama.cpp computes silu"
    elif windows or getattr(config, "use_sliding_window", False):
        reason = "it has a sliding window (use_sliding_window, layer_types), which llama.cpp would leave out"
    elif scaling.get("partial_rotary_factor", 1.0) != 1.0:
        reason = "only a part of each head is rotated (partial_rotary_factor)"
    elif kind not in ("default", "linear", "yarn") and not (kind == "llama3" and config.model_type == "llama"):
        reason = (
            f"rope_type {kind} is not written for {config.model_type}; default, linear, yarn and Llama's llama3 are"
        )
    elif kind == "yarn" and (more := sorted(key for key in scaling.keys() - YARN_SETTINGS if scaling[key] is not None)):
        reason = f"yarn has the settings {', '.join(more)}, which are not written"
    elif config.model_type == "qwen3" and config.attention_bias:
        reason = "its attention has a bias, which llama.cpp's qwen3 has not"
    if reason:
        raise ConfigError(f"model: {folder} cannot be written as GGUF: {reason}.")


def weight_names(config: PreTrainedConfig) -> dict[str, GgufWeight]:
    """Return each weight that the model has, by its name in model.safetensors, in the order of the GGUF file."""
    biased, has_head_norms = GGUF_FAMILIES[config.model_type]
    if config.model_type == "llama":
        biased = tuple(ATTENTION_NAMES) if config.attention_bias else ()
        biased += tuple(FEED_FORWARD_NAMES) if config.mlp_bias else ()
    weights = {"model.embed_tokens.weight": GgufWeight("token_embd.weight")}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"blk.{layer}"
        norms = {f"{theirs}.{name}": f"{ours}.{gguf}" for name, gguf in NORM_NAMES.items()}
        if has_head_norms:
            norms |= {f"{theirs}.self_attn.{name}": f"{ours}.{gguf}" for name, gguf in HEAD_NORM_NAMES.items()}
        weights |= {f"{name}.weight": GgufWeight(f"{gguf}.weight") for name, gguf in norms.items()}
        for part, names in (("self_attn", ATTENTION_NAMES), ("mlp", FEED_FORWARD_NAMES)):
            for name, gguf in names.items():
                heads = _reordered_heads(config, name)
                for kind in ("weight", "bias") if name in biased else ("weight",):
                    weights[f"{theirs}.{part}.{name}.{kind}"] = GgufWeight(f"{ours}.{gguf}.{kind}", heads)
    weights["model.norm.weight"] = GgufWeight("output_norm.weight")
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = GgufWeight("output.weight")
    return weights


def _reordered_heads(config: PreTrainedConfig, name: str) -> int:
    if config.model_type != "llama" or name not in ("q_proj", "k_proj"):
        return 0
    return config.num_attention_heads if name == "q_proj" else config.num_key_value_heads


def pair_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * size, ...] for llama.cpp's rotation of Llama.

    transformers rotates row j of a head together with row j + size / 2, llama.cpp rotates rows 2j and 2j + 1. The
    products of queries and keys stay the same, since both are reordered.
    """
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def head_size(config: PreTrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotation_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """Return by what llama.cpp has to divide each frequency, float32 [head size / 2]; None without Llama 3's scaling."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def add_settings(writer: Any, config: PreTrainedConfig, gguf: Any) -> None:
    """Write the settings of the model; `writer` is a GGUFWriter of the package `gguf`."""
    scaling, size = config.rope_parameters, head_size(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(scaling["rope_theta"])
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
