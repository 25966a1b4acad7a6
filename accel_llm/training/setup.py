"""Steps of every training script before its loop: read options, encode text, assemble a model, build an optimizer."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.budget import follow_budget, set_schedule
from accel_llm.adapters.data_starts import start_from_rows
from accel_llm.adapters.defaults import describe_rate, fill_learning_rate, fill_method_options
from accel_llm.adapters.methods import check_method, fresh_adapter_config
from accel_llm.adapters.partial import train_part
from accel_llm.adapters.refusals import check_quantized_base
from accel_llm.backend.deepspeed_recipe import take_optimizer_and_schedule
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.backend.strategy import engine
from accel_llm.chat.template import Template, configured_template
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.command_line import parse_options, resolved_options
from accel_llm.config.options import OVERFIT_DEFAULTS, SftOptions, TrainOptions
from accel_llm.config.preference_options import AnswerOptions, KtoOptions, PairOptions, PreferenceOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.answers import Pairs, as_units, collate_answers
from accel_llm.data.batches import collate
from accel_llm.data.corpus import corpus_defaults
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.prepare import EncodedData, encode_conversations, encode_texts
from accel_llm.data.prepare_stream import encode_stream
from accel_llm.data.rows import Rows
from accel_llm.data.step_sizes import fill_token_counts
from accel_llm.data.stream import Position, Stream, TrainingPlan
from accel_llm.data.texts import collate_texts
from accel_llm.demo.files import TrainOptionsT, parse_options_or_demo, resolve_demo
from accel_llm.model.classifier import score_config
from accel_llm.model.fresh_config import fit_to_tokenizer
from accel_llm.model.generation import stop_token_ids
from accel_llm.model.loading import build_model, load_model, load_model_config
from accel_llm.model.neftune import attach_neftune
from accel_llm.model.padding import embedding_rows, fit_pad_token, separate_pad_token
from accel_llm.model.placement import place_weights
from accel_llm.model.tokenizer import check_token_ids, configured_tokenizer, pad_token_id
from accel_llm.model.vocabulary import add_missing_tokens, extend_vocabulary
from accel_llm.preference.reference import Reference
from accel_llm.report.record import Record
from accel_llm.report.row_facts import row_facts
from accel_llm.system.progress import shown
from accel_llm.training.check_run import check_run
from accel_llm.training.check_steps import show_verdict
from accel_llm.training.classes import add_labels, encode_texts_for_classes, fit_to_model
from accel_llm.training.evaluation import Measure
from accel_llm.training.intervals import fill_intervals
from accel_llm.training.memory_advice import note_memory_advice
from accel_llm.training.optimizers import build_optimizer
from accel_llm.training.other_reference import ask_other_reference
from accel_llm.training.preference_evaluation import preference_metrics
from accel_llm.training.run_plan import show_run_plan
from accel_llm.training.schedule import build_schedule
from accel_llm.training.start import Start
from accel_llm.training.text_evaluation import text_metrics


def read_options(
    options_class: type[TrainOptionsT],
    demo: str | None = None,
) -> TrainOptionsT:
    """Read and check the options of a training script from its command line and recipe.

    `demo` is the name of the recipe to use if the command line names no model, data or recipe.
    The defaults of the method are filled in, or with `adapter_name_or_path` the settings of that adapter.

    Raises:
        ConfigError: an option, the model or a source of rows cannot be used. It lists all problems.
    """
    if demo is not None:
        options = parse_options_or_demo(options_class, demo, sys.argv[1:])
    else:
        options = resolve_demo(parse_options(options_class, sys.argv[1:], options_class.script_defaults))
    if isinstance(options, SftOptions) and options.overfit:
        options = options.with_defaults(OVERFIT_DEFAULTS)
    options = fill_method_options(adopt_adapter_options(take_optimizer_and_schedule(options)))
    options = options.with_defaults(corpus_defaults(options))
    check_method(options)
    check_run(options)
    quiet_libraries()
    if isinstance(options, ClassifyOptions):
        options = fit_to_model(options)
    fill_token_counts(options)
    return fill_learning_rate(options)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer and the chat template bound to it; `new_tokens` are the ids that `add_tokens` has added."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    new_tokens: range


@shown("load tokenizer")
def chat_tokenizer(options: SftOptions) -> ChatTokenizer:
    """Load the tokenizer and the chat template of a run.

    Raises:
        ConfigError: one of them cannot be loaded, or they do not fit each other.
    """
    tokenizer = configured_tokenizer(options)
    new_tokens = add_missing_tokens(tokenizer, options)
    template = configured_template(tokenizer, options)
    if options.chat_template or not isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = template.source  # so that the export has the template of the training
    return ChatTokenizer(tokenizer, template, new_tokens)


@shown("load tokenizer")
def text_tokenizer(options: PretrainOptions | ClassifyOptions) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a run on plain text, which needs no chat template.

    Raises:
        ConfigError: it cannot be loaded.
    """
    return configured_tokenizer(options)


def encode_chats(options: SftOptions, config: PreTrainedConfig, chat: ChatTokenizer) -> EncodedData:
    """Encode conversations as rows for training and evaluation. With `overfit` the training rows are evaluated.

    Raises:
        ConfigError: the model has no embedding for some token, or too many rows or trained tokens are lost.
        DataError: a row cannot be used.
    """
    data = encode_conversations(options, options.seed, chat.tokenizer, chat.template)
    check_token_ids(data.token_ids, config, chat.tokenizer, chat.new_tokens)
    fit_pad_token(chat.tokenizer, config, chat.new_tokens)
    return replace(data, eval=data.train) if options.overfit else data


def preference_kind(options: SftOptions) -> PreferenceKind | None:
    """Return what the rows of preferences are read for; None if the rows are those of fine-tuning."""
    if not isinstance(options, AnswerOptions):
        return None
    all_pairs = isinstance(options, PairOptions) and options.scored_answers == "all_pairs"
    return PreferenceKind(isinstance(options, KtoOptions), margins=options.gives_scores, all_pairs=all_pairs)


def encode_preferences(options: AnswerOptions, config: PreTrainedConfig, chat: ChatTokenizer) -> EncodedData:
    """Encode pairs of answers, or answers with a label, as rows; raises the errors of `encode_chats`."""
    kind = preference_kind(options)
    data = encode_conversations(options, options.seed, chat.tokenizer, chat.template, preferences=kind)
    check_token_ids(data.token_ids, config, chat.tokenizer, chat.new_tokens)
    fit_pad_token(chat.tokenizer, config, chat.new_tokens)
    if options.gives_scores:
        separate_pad_token(chat.tokenizer, config, data, chat.template.turn_end_id)
    return data


def encode_documents(
    options: PretrainOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> EncodedData:
    """Encode plain text as rows, or open it as a stream, and fit a fresh model's `config` to `tokenizer`.

    Raises the errors of `encode_chats`.
    """
    remedy = fit_to_tokenizer(options, config, tokenizer)
    if options.streaming:
        data = encode_stream(options, tokenizer, embedding_rows(config) - 1)
    else:
        data = encode_texts(options, options.seed, tokenizer, options.text_column)
    check_token_ids(data.token_ids, config, tokenizer, remedy=remedy)
    fit_pad_token(tokenizer, config)
    return data


def encode_labelled_texts(
    options: ClassifyOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[EncodedData, PreTrainedConfig]:
    """Encode texts with labels as rows; return them, and the config of the classifier, with the names of the labels.

    Raises:
        ConfigError, DataError: as `encode_texts_for_classes` does.
    """
    data = encode_texts_for_classes(options, config, tokenizer)
    return data, add_labels(config, data)


def measure_texts(data: EncodedData, record: Record) -> Measure:
    """Return how to measure texts with labels; their confusion matrix goes into `record`."""
    assert data.labels is not None
    return partial(text_metrics, data.labels, record)


@shown("read config")
def read_config(options: TrainOptions) -> PreTrainedConfig:
    """Read the model's config, but no weights.

    Raises:
        ConfigError: as `load_model_config` does, or the method cannot train on a base in 4 or 8 bits.
    """
    config = load_model_config(options, options.max_length)
    check_quantized_base(options, config)
    return score_config(config) if isinstance(options, RewardOptions) else config


@shown("pack rows")
def open_stream(options: TrainOptions, rows: Rows, start: Position, tokenizer: PreTrainedTokenizerFast) -> Stream:
    """Open the endless stream of this process's micro-batches, which begins at `start`.

    Pairs of answers that are packed have their prompt in common, unless virtual tokens come before each document.
    How often the run evaluates and saves is set, if it is not given.
    """
    units: Rows | Pairs = rows
    if isinstance(options, AnswerOptions):
        units = as_units(rows, bool(options.packing) and not options.virtual_tokens)
    kinds = {ClassifyOptions: collate_texts, AnswerOptions: collate_answers}
    make_batch = next((function for kind, function in kinds.items() if isinstance(options, kind)), collate)
    stream = Stream(units, options, start, pad_token_id(tokenizer), make_batch)
    fill_intervals(options, stream.plan.total_steps)
    return stream


def show_plan_and_memory(
    accelerator: Accelerator,
    options: TrainOptions,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    data: EncodedData,
    plan: TrainingPlan,
) -> dict[str, Any]:
    """Say on the main process what the run will do (see `show_run_plan`); return what run.json keeps of it, and of the rows.

    Raises:
        ConfigError: the run is too short for the schedule of its method, or the method cannot compute on this model.
    """
    if options.has_adapter:  # only to refuse it before weights are read
        set_schedule(fresh_adapter_config(options), options, plan.total_steps)
    facts = show_run_plan(accelerator, options, config, tokenizer, data, plan)
    return facts | {"rows": row_facts(tokenizer, data.train, data.labels)}


@shown("load model")
def assemble_model(
    accelerator: Accelerator,
    options: TrainOptions,
    config: PreTrainedConfig,
    stream: Stream,
    new_tokens: range = range(0),
) -> torch.nn.Module:
    """Build or load the model, adapt it, and place its weights on their devices. All processes must call it.

    `stream` tells methods that ask for it the number of steps and the first rows.

    The order matters. The seed comes before all random weights. New tokens get their rows before an adapter freezes the
    model. NEFTune is attached to the finished embedding. Weights are quantized and sharded last, when all of them are
    there.
    """
    note_memory_advice(accelerator, options, config)
    set_seed(options.seed)
    fresh = isinstance(options, PretrainOptions) and options.config_name
    model: Any = (
        build_model(config, options) if fresh else load_model(options, config if options.gives_scores else None)
    )
    extend_vocabulary(model, new_tokens)
    if options.has_adapter:
        model = attach_adapter(model, options, new_tokens)
    train_part(model, options, new_tokens)
    attach_neftune(model, options.neftune_noise_alpha)
    place_weights(accelerator, model, options)
    start_from_rows(accelerator, model, options, stream)
    return model


def find_reference(
    accelerator: Accelerator,
    options: PreferenceOptions,
    data: EncodedData,
    stream: Stream,
    start: Start,
) -> Reference:
    """Read the reference's log-probabilities, if they are beside the rows; `add_reference` computes them otherwise.

    With `reference_model_name_or_path` that model is loaded, asked and forgotten here, before the policy is loaded.

    Raises:
        ConfigError: a run is continued whose reference is gone, or the other model cannot be used.
    """
    reference = Reference(accelerator, options, data, stream)
    reference.find(resumed=start.folder is not None)
    if reference.missing and options.reference_model_name_or_path:
        ask_other_reference(accelerator, options, data, reference)
    return reference


def share_prompts(
    accelerator: Accelerator, model: torch.nn.Module, options: RewardOptions, data: EncodedData, stream: Stream
) -> Measure | None:
    """Let both answers of a pair have their prompt in common, if `model` can; return how to measure rows to evaluate on.

    All processes must call it.
    """
    return add_reference(accelerator, model, Reference(accelerator, options, data, stream))


def add_reference(accelerator: Accelerator, model: torch.nn.Module, reference: Reference) -> Measure | None:
    """Put the reference's log-probabilities into the rows to train on; return how to measure those to evaluate on.

    If they are missing, `model` computes them as it is now: prepared, but not trained, and before a checkpoint is read.
    Whether pairs can share their prompt is tested on it too. All processes must call it.
    """
    share, stream = reference.can_share(model), reference.stream
    if reference.missing:
        reference.compute(model, share)
    stream.rows, stream.collate = reference.rows("train", share)
    return partial(preference_metrics, *reference.rows("eval", share)) if "eval" in reference.parts else None


@shown("build optimizer")
def optimizer_and_schedule(
    accelerator: Accelerator, model: torch.nn.Module, options: TrainOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build the optimizer over all trainable parameters, and the schedule. `prepare` takes the optimizer alone.

    A method that acts after each step does so in a hook of the optimizer.
    """
    optimizer = build_optimizer(model, options, accelerator.device.type, engine(), options.seed)
    scheduler = build_schedule(optimizer, options, total_steps)
    follow_budget(model, options, optimizer, scheduler, total_steps)
    return optimizer, scheduler


def stop_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, template: Template | None = None
) -> list[int]:
    """Return the ids of the tokens that end an answer, both in evaluation and in the exported generation config."""
    return stop_token_ids(model, tokenizer, template.turn_end_id if template else None)


def run_facts(options: TrainOptions, data: EncodedData, checks: dict[str, Any]) -> dict[str, Any]:
    """Collect the facts for run.json that are known before the first step: checks, all options, the data and its ledger."""
    return checks | {
        "options": resolved_options(options),
        "changed_options": options.changed_names(),
        "learning_rate": describe_rate(options),
        "data": data.fingerprint,
        "ledger": data.ledger.to_dict(),
    }


def end_check(
    accelerator: Accelerator, options: TrainOptions, checks: dict[str, Any], plan: TrainingPlan, seconds: list[float]
) -> None:
    """Print the verdict of `check_only` (see `show_verdict`), and remove its folder."""
    show_verdict(accelerator, options, checks, plan, seconds)
