"""The language part of a model that also takes images, sound or video: text trains it, and nothing else."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.system.launcher import process_rank


def causal_lm_loader(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads a model of this config as a language model.

    transformers counts some vision-language models among the causal LMs and others not; all of them can be trained and
    asked with text alone.
    """
    is_vision_language = type(config) in AutoModelForImageTextToText._model_mapping
    causal = type(config) in AutoModelForCausalLM._model_mapping or not is_vision_language
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that `causal_lm_loader` builds; None if it comes with the model, as code."""
    mapping = causal_lm_loader(config)._model_mapping
    model_class = mapping.get(type(config), None)
    return model_class[0] if isinstance(model_class, tuple) else model_class


def parts_beside_language(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules with weights that no text passes through, such as a vision tower, by name."""
    inner = unwrap_causal_lm(model)
    if inner.config.get_text_config() is inner.config:
        return {}
    language = [inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings()]
    used = {module for part in language if part is not None for module in part.modules()}
    parts: dict[str, nn.Module] = {}
    for name, module in inner.named_modules():
        inside = any(name.startswith(f"{part}.") for part in parts)
        if not inside and used.isdisjoint(module.modules()) and any(True for _ in module.parameters()):
            parts[name] = module
    return parts


def freeze_other_parts(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Freeze all parts that no text passes through, and say so. `config` is the one in the model's files."""
    parts = parts_beside_language(model)
    for part in parts.values():
        part.requires_grad_(False)
    if process_rank() != 0:
        return
    if parts:
        print(
            f"{type(model).__name__}: only its language part is trained; {', '.join(parts)} get no text, and stay as "
            "they are",
            flush=True,
        )
    elif type(model.config) is not type(config):
        print(
            f"{type(model).__name__} is only the language part of this model; its other parts (vision, sound) are left "
            "out, also of what is exported",
            flush=True,
        )
