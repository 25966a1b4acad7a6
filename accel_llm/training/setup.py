"""What every training script does before its loop: options read, text encoded, a model assembled, an optimizer built."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.adapters.attach import adopt_adapter_options, attach_adapter
from accel_llm.backend.accelerator import quiet_libraries
from accel_llm.backend.strategy import engine
from accel_llm.chat.template import Template, configured_template
from accel_llm.config.command_line import parse_options, resolved_options
from accel_llm.config.options import OVERFIT_DEFAULTS, PretrainOptions, SftOptions, TrainOptions
from accel_llm.data.prepare import EncodedData, encode_conversations, encode_texts
from accel_llm.data.sources import source_problems
from accel_llm.demo.files import TrainOptionsT, parse_or_demo, resolve_demo
from accel_llm.errors import raise_problems
from accel_llm.model.generation import stop_token_ids
from accel_llm.model.loading import build_model, load_model, load_model_config, model_problems
from accel_llm.model.neftune import neftune
from accel_llm.model.placement import place_weights
from accel_llm.model.tokenizer import check_token_ids
from accel_llm.model.tokenizer import configured_tokenizer as configured_tokenizer
from accel_llm.model.tokenizer import pad_token_id as pad_token_id
from accel_llm.model.vocabulary import add_missing_tokens, extend_vocabulary
from accel_llm.training.optimizers import build_optimizer
from accel_llm.training.schedule import build_schedule


def read_options(
    options_class: type[TrainOptionsT],
    defaults: dict[str, Any] | None = None,
    demo: Path | None = None,
) -> TrainOptionsT:
    """The options of a training script from its command line and recipe, checked.

    `defaults` are the script's own. `demo` is the recipe of a person who names no model, data or recipe. An
    adapter that is continued brings its own options.

    Raises:
        ConfigError: an option, a model or a source of rows cannot be used; all problems are told at once.
    """
    if demo is not None:
        options = parse_or_demo(options_class, demo, sys.argv[1:])
    else:
        options = resolve_demo(parse_options(options_class, sys.argv[1:], defaults))
    if isinstance(options, SftOptions) and options.overfit:
        options = options.with_defaults(OVERFIT_DEFAULTS)
    options = adopt_adapter_options(options)
    raise_problems(model_problems(options) + source_problems(options))
    quiet_libraries()
    return options


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the chat template that is bound to it; `new_tokens` are the ids that `add_tokens` has added."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    new_tokens: range


def chat_tokenizer(options: SftOptions) -> ChatTokenizer:
    """The run's tokenizer and template. The tokenizer is exported with the template that it was trained with."""
    tokenizer = configured_tokenizer(options)
    new_tokens = add_missing_tokens(tokenizer, options)
    template = configured_template(tokenizer, options)
    tokenizer.chat_template = template.source
    return ChatTokenizer(tokenizer, template, new_tokens)


def encode_chats(options: SftOptions, config: PreTrainedConfig, chat: ChatTokenizer) -> EncodedData:
    """Rows of conversations for training and evaluation; with `overfit` the training rows are evaluated."""
    data = encode_conversations(options, options.seed, chat.tokenizer, chat.template)
    check_token_ids(data.token_ids, config, chat.tokenizer, chat.new_tokens)
    return replace(data, eval=data.train) if options.overfit else data


def encode_documents(
    options: PretrainOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> EncodedData:
    """Rows of plain text for training and evaluation."""
    data = encode_texts(options, options.seed, tokenizer, options.text_column)
    check_token_ids(data.token_ids, config, tokenizer)
    return data


def read_config(options: TrainOptions) -> PreTrainedConfig:
    """The model's config, before any weight is read; raises ConfigError as `load_model_config` does."""
    return load_model_config(options, options.max_length)


def assemble_model(
    accelerator: Accelerator, options: TrainOptions, config: PreTrainedConfig, new_tokens: range = range(0)
) -> torch.nn.Module:
    """The model as it will train, its weights on their devices. A collective.

    The order matters: the seed comes before whatever draws weights; new tokens need their rows before an adapter freezes
    the model; noise goes on the embedding that is left; and weights are quantised and sharded once none will be added.
    """
    set_seed(options.seed)
    fresh = isinstance(options, PretrainOptions) and options.config_name
    model: Any = build_model(config, options) if fresh else load_model(options)
    extend_vocabulary(model, new_tokens)
    if options.method != "full":
        model = attach_adapter(model, options, new_tokens)
    neftune(model, options.neftune_noise_alpha)
    place_weights(accelerator, model, options)
    return model


def optimizer_and_schedule(
    accelerator: Accelerator, model: torch.nn.Module, options: TrainOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer over what is trained, and the learning rate's course. Only the optimizer goes through `prepare`."""
    optimizer = build_optimizer(model, options, accelerator.device.type, engine(), options.seed)
    return optimizer, build_schedule(optimizer, options, total_steps)


def stop_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, template: Template | None = None
) -> list[int]:
    """The tokens that end an answer, in evaluation and in the generation config that is exported."""
    return stop_token_ids(model, tokenizer, template.turn_end_id if template else None)


def run_facts(options: TrainOptions, data: EncodedData, checks: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of a run from its first second: what was checked, every option, the data and its ledger."""
    return checks | {
        "options": resolved_options(options),
        "data": data.fingerprint,
        "ledger": data.ledger.to_dict(),
    }
