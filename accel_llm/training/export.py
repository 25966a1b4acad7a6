"""Export the result of a run: adapter/ or model/, with tokenizer, chat template and generation config."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.adapters.partial import PARTIAL_METHODS
from accel_llm.adapters.saved import save_adapter
from accel_llm.backend.accelerator import gather_weights, unwrap_model
from accel_llm.config.options import TrainOptions
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.config_file import save_config
from accel_llm.model.generation import build_generation_config
from accel_llm.model.loading import load_complete_model
from accel_llm.model.stored_dtypes import StoredDtypes
from accel_llm.model.tokenizer_file import save_tokenizer
from accel_llm.report.record import Record
from accel_llm.system.folders import atomic_folder
from accel_llm.system.progress import shown
from accel_llm.system.quiet import quietly
from accel_llm.training.read_back import read_export_back, sample_logits
from accel_llm.training.start import Start


@shown("export")
def export_model(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    stop: list[int],
    options: TrainOptions,
    config: PreTrainedConfig,
    start: Start,
    record: Record,
    folder: Path | None = None,
) -> Path:
    """Write adapter/ or model/ in the run's folder, or `folder`, and return its path. All processes must call it.

    The folder appears complete, by one rename, after it was read back; `record` gets what was compared. Full weights
    have the dtypes of the files that the run started from. Adapters are float32 and record the base's name and
    fingerprint. `stop` are the ids of tokens that end an answer.

    Raises:
        ConfigError: what was written cannot be loaded, or is something else than what was trained.
    """
    inner = unwrap_model(accelerator, model)
    causal_lm, peft = unwrap_causal_lm(inner), hasattr(inner, "peft_config")
    place = folder or start.output_dir / ("adapter" if peft else "model")
    # Every process takes part, and the main one gets the results.
    from_files = options.method in PARTIAL_METHODS and not getattr(options, "config_name", None)
    state = gather_weights(accelerator, model, trainable_only=peft or from_files)
    logits = sample_logits(accelerator, model)
    if accelerator.is_main_process:
        with atomic_folder(place) as partial:
            if peft:
                save_adapter(inner, partial, state, str(options.model_name_or_path), start.identity["base"])
                if options.gives_scores:  # the labels, which PEFT's files do not have, and the pad token
                    save_config(_plain_config(causal_lm), partial)
            else:
                stored = StoredDtypes(options, config)
                state = _weights_in_files(options, config) | state if from_files else state
                state = _model_state(causal_lm, stored.cast(causal_lm, state))
                _save_model(causal_lm, partial, state, stored.main)
            if not options.gives_scores:
                build_generation_config(causal_lm, tokenizer, stop).save_pretrained(str(partial))
            save_tokenizer(tokenizer, partial)
            compared = read_export_back(partial, inner, state, logits, options)
        if folder is None:
            record.update(export=compared)
    accelerator.wait_for_everyone()
    return place


def _plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model without a quantization, which belongs to the base as it was loaded here."""
    config: Any = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _weights_in_files(options: TrainOptions, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return the weights that the run started from; those of a frozen part may be rounded in the model that computed."""
    unset_hf_deepspeed_config()  # otherwise transformers would shard what it loads under ZeRO-3
    arguments: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    arguments |= {"dtype": "auto", "scores": config if options.gives_scores else None}
    name = str(options.model_name_or_path)
    with quietly():
        model = load_complete_model(name, allow_pickle=options.allow_pickle, for_training=True, **arguments)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _model_state(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add buffers that are part of a model, such as DeepSeek-V3's expert biases. They keep their own dtype."""
    saved = model.state_dict().keys()
    return weights | {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}


def _save_model(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    model.save_pretrained(str(folder), state_dict=dict(state))
    # transformers 5.23 writes the dtype of training, float32, into config.json and would load these weights in it.
    model.config.dtype = dtype
    save_config(model.config, folder)
