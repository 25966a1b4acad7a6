"""Export the result of a run: adapter/ or model/, with tokenizer, chat template and generation config."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.adapters.saved import save_adapter
from accel_llm.backend.accelerator import gather_weights, unwrap_model
from accel_llm.config.options import TrainOptions
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.config_file import save_config
from accel_llm.model.generation import build_generation_config
from accel_llm.model.loading import stored_dtype
from accel_llm.model.tokenizer_file import save_tokenizer
from accel_llm.system.folders import atomic_folder
from accel_llm.training.start import Start


def export_model(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    stop: list[int],
    options: TrainOptions,
    config: PreTrainedConfig,
    start: Start,
) -> Path:
    """Write adapter/ or model/ in the run's folder and return its path. All processes must call it.

    The folder appears complete, by one rename. Full weights have the dtype that the base was stored in (`config`).
    Adapters are float32 and record the base's name and fingerprint. `stop` are the ids of tokens that end an answer.
    """
    inner = unwrap_model(accelerator, model)
    peft = hasattr(inner, "peft_config")
    folder = start.output_dir / ("adapter" if peft else "model")
    state = gather_weights(accelerator, model, trainable_only=peft)  # every process takes part; the main one gets it
    if accelerator.is_main_process:
        with atomic_folder(folder) as partial:
            if peft:
                save_adapter(inner, partial, state, str(options.model_name_or_path), start.identity["base"])
            else:
                _save_model(unwrap_causal_lm(inner), partial, state, stored_dtype(config))
            build_generation_config(unwrap_causal_lm(inner), tokenizer, stop).save_pretrained(str(partial))
            save_tokenizer(tokenizer, partial)
    accelerator.wait_for_everyone()
    return folder


def _save_model(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # Buffers can be part of a model too, such as DeepSeek-V3's expert biases. They keep their own dtype.
    state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
    model.save_pretrained(str(folder), state_dict=state)
    # transformers 5.23 writes the dtype of training, float32, into config.json and would load these weights in it.
    model.config.dtype = dtype
    save_config(model.config, folder)
