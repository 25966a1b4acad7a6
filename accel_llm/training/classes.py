"""Steps of launch/classify.py before its loop: texts with labels as rows, and what the labels mean to the model."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.adapters.heads import count_saved_scores, saved_config
from accel_llm.classification.losses import balanced_weights
from accel_llm.config.classify_options import METRICS_BY_PROBLEM_TYPE, ClassifyOptions
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, LabelKind, Labels
from accel_llm.data.prepare import EncodedData, encode_labelled
from accel_llm.data.rows import Rows
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.classifier import REWARD_LABEL, has_scores, scores_last_token
from accel_llm.model.encoders import classifier_config
from accel_llm.model.loading import load_model_config
from accel_llm.model.padding import fit_pad_token, separate_pad_token
from accel_llm.model.positions import position_limit
from accel_llm.model.text_packing import fit_packing
from accel_llm.model.tokenizer import check_token_ids
from accel_llm.system.launcher import process_rank


def fit_to_model(options: ClassifyOptions) -> ClassifyOptions:
    """Return the options with what the model needs, where the user has set nothing else; the main process says it.

    `max_length` is at most the positions of the model, and texts are padded if the family cannot take packed ones.

    Raises:
        ConfigError: the config of the model cannot be loaded, or packing was set, and cannot be.
    """
    config = load_model_config(options)
    limit, default = position_limit(config), ClassifyOptions.model_fields["max_length"].default
    options, sentence = fit_packing(options.with_defaults({"max_length": min(limit or default, default)}), config)
    if sentence and process_rank() == 0:
        print(sentence, flush=True)
    return options


def encode_texts_for_classes(
    options: ClassifyOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> EncodedData:
    """Encode texts, or pairs of texts, with labels as rows for training and evaluation.

    A classifier, or an adapter of one, that is trained further keeps its labels, which the data must fit.

    Raises:
        ConfigError: the model has no embedding for some token, an option has no meaning for the labels, or too many rows
            are lost.
        DataError: a row cannot be used, or its label is none of the trained model.
    """
    give_segments(tokenizer, config)
    kind = _trained_labels(options, config)
    data = encode_labelled(options, options.seed, tokenizer, kind.problem_type, kind.names)
    assert data.labels is not None
    _check_options(options, data.labels)
    _check_metric(options, data, data.labels)
    check_token_ids(data.token_ids, config, tokenizer)
    fit_pad_token(tokenizer, config)
    if scores_last_token(config):
        separate_pad_token(tokenizer, config, data, None)
    # Whoever asks the model later should cut texts as they are cut here.
    tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = options.max_length
    return _weigh_classes(options, data, data.labels)


def give_segments(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Let `tokenizer` tell the second text of a pair from the first (token types), if the model has an embedding for it.

    transformers 5.24 loads the files of BERT's tokenizer, where there is no config.json beside them, as that of
    DistilBERT, which tells nothing.
    """
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:  # the code of the model is beside it
        return
    model_class, names = mapping[type(config)], tokenizer.model_input_names
    wanted = "token_type_ids" in inspect.signature(model_class.forward).parameters
    if not wanted or (getattr(config, "type_vocab_size", None) or 0) < 2 or "token_type_ids" in names:
        return
    if 1 in tokenizer.backend_tokenizer.encode("a", "a").type_ids:
        tokenizer.model_input_names = [*names, "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so that it is saved


def add_labels(config: PreTrainedConfig, data: EncodedData) -> PreTrainedConfig:
    """Return the config of the classifier that is trained: with the names of the labels of `data`."""
    assert data.labels is not None
    return classifier_config(config, data.labels)


def _trained_labels(options: ClassifyOptions, config: PreTrainedConfig) -> LabelKind:
    """Return the problem type that the run trains, and the names of a trained head, as far as they are known.

    Raises:
        ConfigError: `problem_type` is not that of the trained head.
    """
    adapter = options.adapter_name_or_path
    if not (adapter or has_scores(config)):
        return LabelKind(options.problem_type, None)
    trained: Any = saved_config(Path(adapter)) if adapter else config
    if trained is None:  # an adapter of another program; transformers' names have the numbers of the classes
        count = count_saved_scores(Path(str(adapter)))
        if not (has_scores(config) and config.num_labels == count):
            return LabelKind(options.problem_type, tuple(f"LABEL_{k}" for k in range(count)) or None)
        trained = config
    if list(trained.id2label.values()) == [REWARD_LABEL]:
        raise ConfigError(
            f"{'adapter_name_or_path' if adapter else 'model_name_or_path'}: {adapter or options.model_name_or_path} is a "
            "reward model; train it further with launch/reward.py, or name a model with another head or none."
        )
    if options.problem_type and trained.problem_type not in (None, options.problem_type):
        raise ConfigError(
            f"problem_type: {options.problem_type} is given, but the head of {adapter or options.model_name_or_path} was "
            f"trained for {trained.problem_type}; leave it out."
        )
    names = tuple(str(trained.id2label[k]) for k in range(trained.num_labels))
    return LabelKind(options.problem_type or trained.problem_type, names)


def _check_options(options: ClassifyOptions, labels: Labels) -> None:
    """Check the options that depend on what the labels are.

    Raises:
        ConfigError: one has no meaning for them.
    """
    problem_type, metric = labels.problem_type, options.metric_for_best_model
    problems = []
    if metric in METRICS_BY_PROBLEM_TYPE and problem_type not in METRICS_BY_PROBLEM_TYPE[metric]:
        allowed = [name for name, types in METRICS_BY_PROBLEM_TYPE.items() if problem_type in types]
        problems.append(
            f"metric_for_best_model: {metric} is not computed for {problem_type}; use eval/loss, {', '.join(allowed)}."
        )
    if problem_type == REGRESSION:
        problems += [
            f"{name}: only classes use it, but the labels are numbers (regression); remove it."
            for name in ("class_weights", "focal_gamma", "label_smoothing_factor")
            if getattr(options, name)
        ]
    elif options.class_weights not in ([], "balanced") and len(options.class_weights) != len(labels.names):
        problems.append(
            f"class_weights: {len(options.class_weights)} weights do not fit {len(labels.names)} classes; give one for "
            f"each of {', '.join(labels.names)}."
        )
    raise_problems(problems)


def _check_metric(options: ClassifyOptions, data: EncodedData, labels: Labels) -> None:
    """Check that the rows to evaluate on define the metric that chooses a checkpoint: hours later it would be too late.

    Raises:
        ConfigError: a class has no row, or all rows have the same label.
    """
    metric, targets = options.metric_for_best_model, data.eval.targets if data.eval else None
    if targets is None or metric not in ("eval/auc", "eval/mcc", "eval/pearson", "eval/spearman"):
        return
    reason = ""
    if labels.problem_type == MULTI_LABEL:
        if not ((targets.min(0) == 0) & (targets.max(0) == 1)).any():
            reason = "no class that some rows have and some do not"
    elif len(np.unique(targets)) < 2:
        reason = "the same label in all rows"
    elif metric == "eval/auc":
        counts = np.bincount(targets[:, 0].astype(np.int64), minlength=len(labels.names))
        missing = [name for name, count in zip(labels.names, counts, strict=True) if not count]
        reason = f"no row of {', '.join(missing[:3])}" if missing else ""
    if reason:
        raise ConfigError(
            f"metric_for_best_model: {metric} needs rows of each class, or of different numbers, to evaluate on, but there is "
            f"{reason}; use eval/loss, or give other eval_files."
        )


def _weigh_classes(options: ClassifyOptions, data: EncodedData, labels: Labels) -> EncodedData:
    """Put the weights of the classes into the rows, and note them in the ledger."""
    if not options.class_weights:
        return data
    weights = _balanced(data.train, labels) if options.class_weights == "balanced" else options.class_weights
    shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(labels.names, weights, strict=True))
    data.ledger.note(f"Weights of the classes in the loss: {shown}.")
    array = np.array(weights, np.float64)
    train, evaluation = (part and replace(part, class_weights=array) for part in (data.train, data.eval))
    return replace(data, train=train, eval=evaluation)


def _balanced(rows: Rows, labels: Labels) -> list[float]:
    """Return the weight of each class for which all weigh the same; of several classes, both answers for each."""
    assert rows.targets is not None
    if labels.problem_type == MULTI_LABEL:
        with_class = rows.targets.sum(0, dtype=np.float64)
        return ((len(rows) - with_class) / np.maximum(with_class, 1)).tolist()
    counts = np.bincount(rows.targets[:, 0].astype(np.int64), minlength=len(labels.names))
    return balanced_weights(torch.from_numpy(np.maximum(counts, 1))).tolist()
