"""Scores of whole texts from any model for sequence classification; encoders keep their own pooling and head.

An encoder (BERT and its relatives) reads a text from both sides, and its head reads the states of the whole text: of the
first token, or their mean. In a packed row the layers see the texts one after the other, as those of a decoder do. What
comes after the layers (pooler and head, which transformers writes anew for each family) gets the texts as rows of
their own, [texts, longest, width] or, if it reads the first token only, [texts, 1, width]; so the family's forward
runs as it is.

Where the layers end is found on a copy of the model without values ("meta"): the last module that returns the very
tensor that the encoder returns as its last states. What is called after it and has parameters is the head.
"""

import functools
import inspect
from collections.abc import Sequence
from copy import deepcopy
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from accel_llm.errors import ConfigError
from accel_llm.model.attention import (
    PACKED_ATTENTION,
    REMEDY,
    calls_interface,
    family_class,
    forward_arguments,
    unwrap_causal_lm,
)


class EncoderParts(NamedTuple):
    """Names of modules of an encoder: the one that returns the last states of all tokens, and those of its head.

    `first_only`: the head reads the state of the first token, and no other.
    """

    states: str | None
    head: tuple[str, ...]
    first_only: bool = False


def classifier_config(config: PreTrainedConfig, labels: tuple[Any, Sequence[str]]) -> PreTrainedConfig:
    """Return the config of a classifier made of a model of `config`; `labels` are a problem type and the class names.

    The problem type is one of Hugging Face's: `single_label_classification`, `multi_label_classification`, `regression`.
    The names are in the order of the class numbers.
    """
    config, (problem_type, names) = deepcopy(config), labels
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    config.num_labels, config.problem_type = len(names), problem_type
    config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    if type(config) in mapping:
        config.architectures = [mapping[type(config)].__name__]
    return config


def text_scores(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return what `AutoModelForSequenceClassification` gives as logits for each text alone: float32 [texts, labels].

    Call `attach_scores` (model/classifier.py) on the model first; after that it may be wrapped (PEFT, DDP, DeepSpeed,
    FSDP2). The batch is packed or padded on the right. `first_positions` and `last_positions`, int64 [texts], are
    the places of the first and the last token of each text in its flattened rows, `lengths` a list of their lengths.
    `token_type_ids`, of the shape of `input_ids`, say which of two texts a token belongs to; a model without an
    embedding for them does not get them.
    """
    arguments = forward_arguments(batch)
    if "token_type_ids" in batch and takes_segments(unwrap_causal_lm(model)):
        arguments["token_type_ids"] = batch["token_type_ids"]
    targets = {
        "places": batch["last_positions"],
        "first_positions": batch["first_positions"],
        "longest": max(batch["lengths"]),
    }
    output = model(**arguments, targets=targets, use_cache=False)
    scores = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    return keep_balance(scores, output)


def keep_balance(scores: torch.Tensor, output: Any) -> torch.Tensor:
    """Return `scores` with what the loss adds once for each text as `scores.balance`, such as the penalty of AdaLoRA."""
    scores.balance = getattr(output, "balance", None)  # type: ignore[attr-defined]
    return scores


def balance_of_scores(scores: Any, total_weight: float) -> torch.Tensor | float:
    """Return what the loss of a batch of texts adds to the losses of their `scores`."""
    return 0.0 if scores.balance is None else scores.balance * total_weight


def takes_segments(model: PreTrainedModel) -> bool:
    """Return whether a model reads which of two texts a token belongs to."""
    return "token_type_ids" in inspect.signature(type(model).forward).parameters


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that are the head of a model for sequence classification; it may be wrapped.

    These are the modules with parameters that come after the layers, as `modules_to_save` of PEFT takes them:
    `score` of decoders, `bert.pooler` and `classifier` of BERT, `pre_classifier` and `classifier` of DistilBERT.
    PEFT 0.21's SEQ_CLS saves what ends with `classifier` or `score`, and so neither BERT's pooler, whose values are
    random if the files are those of a masked language model, nor `head` of ModernBERT and `dense` of EuroBERT.
    """
    inner = unwrap_causal_lm(model)
    return ["score"] if isinstance(getattr(inner, "score", None), nn.Module) else list(encoder_parts(inner).head)


def attach_encoder(model: PreTrainedModel) -> None:
    """Let the forward of an encoder with a head take packed rows, and return the scores of their texts as `text_scores`.

    Without `targets` the forward stays the family's own. The last linear layer of the head computes in float32.
    """
    parts, table = encoder_parts(model), position_table(model)
    texts: dict[str, torch.Tensor] = {}  # where the texts are in the row of which the forward runs

    # `wraps` keeps the signature: PEFT reads from it which inputs the model takes.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args, targets: dict[str, Any] | None = None, labels: Any = None, **kwargs):
        if targets is None:
            return type(self).forward(self, *args, labels=labels, **kwargs)
        kwargs.pop("use_cache", None)  # an encoder has no cache, and DeBERTa's forward does not take the name
        if "cu_seq_lens_q" not in kwargs:
            return type(self).forward(self, *args, **kwargs)
        if parts.states is None:
            raise ConfigError(
                f"packing: true does not work with {type(self).__name__}: no module of it returns the last states of "
                f"the tokens as they reach its head; {REMEDY}."
            )
        if table is not None and table.padding_idx is not None:
            kwargs["position_ids"] = _positions(table.padding_idx, kwargs["input_ids"], kwargs["position_ids"])
        texts["places"], mask = _places_and_mask(targets, parts.first_only)
        kwargs["attention_mask"] = mask  # for heads that average; the layers get none
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            texts.clear()

    def drop_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        return args, kwargs | {"attention_mask": None} if texts else kwargs

    def split_texts(module: nn.Module, args: tuple, output: Any) -> Any:
        if not texts:
            return output
        states = _first_tensor(output)
        rows = F.embedding(texts["places"], states.flatten(0, 1))  # [texts, longest, width]
        return _replace_first(output, rows)

    if parts.states is not None:
        model.base_model.register_forward_pre_hook(drop_mask, with_kwargs=True)
        model.get_submodule(parts.states).register_forward_hook(split_texts)
    for layer in [each for name in parts.head[-1:] for each in model.get_submodule(name).modules()]:
        if isinstance(layer, nn.Linear) and layer.out_features == model.config.num_labels:
            layer.forward = MethodType(compute_in_float32, layer)
    model.forward = MethodType(forward, model)


def _places_and_mask(targets: dict[str, Any], first_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the tokens of each text in the row, and 0 for those behind its end, int64 [texts, longest]."""
    first, last = targets["first_positions"][:, None], targets["places"][:, None]
    places = first + torch.arange(1 if first_only else targets["longest"], device=first.device)
    return torch.minimum(places, last), (places <= last).long()


def compute_in_float32(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer gives, computed in float32 whatever the dtype of its weights and of autocast is."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(hidden.to(dtype), layer.weight.to(dtype), bias)


def _positions(padding: int, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Return the positions of a packed row as RoBERTa and its relatives count them for each text alone, int64 [1, T].

    They count the tokens that are not the pad token, from its number + 1 on. The pad token has a row of the table for
    itself, that of its number, `padding`: the table has it as `padding_idx`.
    """
    counted = (input_ids != padding).long()
    counts = counted.cumsum(1)
    starts = torch.arange(input_ids.shape[1], device=input_ids.device) - position_ids
    before = (counts - counted).gather(1, starts)
    positions = (counts - before) * counted + padding
    positions.lengths = getattr(position_ids, "lengths", None)  # type: ignore[attr-defined]
    return positions


def position_table(model: nn.Module) -> Any:
    """Return the embedding of positions of a model, or None if it has no such table."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def encoder_parts(model: PreTrainedModel) -> EncoderParts:
    """Find the modules of a model for sequence classification; `states` is None if its rows cannot be packed that way."""
    # A start asks ten times, and building and running the copy takes a second for a model like BERT-large.
    key = family_class(model), model.config.to_json_string()
    if key not in _found:
        _found[key] = _find_parts(model)
    return _found[key]


_found: dict[tuple[type, str], EncoderParts] = {}


def _find_parts(model: PreTrainedModel) -> EncoderParts:
    prefix = model.base_model_prefix
    outside = [name for name, child in model.named_children() if name != prefix and _has_parameters(child)]
    try:
        twin = _twin_without_values(model)
        calls = _calls(twin)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return EncoderParts(None, tuple(outside))  # its forward reads values, or wants more than ids
    ends = [name for name, _ in calls]
    result = calls[ends.index(prefix)][1] if prefix in ends else None
    same = [k for k, (name, tensor) in enumerate(calls) if tensor is result and name != prefix]
    if result is None or not same:
        return EncoderParts(None, tuple(outside))
    states = ends[same[-1]]
    after = [name for name in ends[same[-1] + 1 :] if not f"{states}.".startswith(f"{name}.") and name]
    after = [name for name in after if _has_parameters(model.get_submodule(name))]
    head = [name for name in after if not any(name.startswith(f"{other}.") for other in after)]
    return EncoderParts(states, tuple(dict.fromkeys(head)), _reads_first_only(twin, states))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _twin_without_values(model: PreTrainedModel) -> Any:
    config = deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        twin: Any = family_class(model)(config).eval()
    # The twin gets no mask, which transformers would read. Families with attention of their own make one of ones; for a
    # name without a mask function transformers leaves it out.
    if not calls_interface(model):
        twin.config._attn_implementation = PACKED_ATTENTION
    for module in twin.modules():
        if isinstance(module, PreTrainedModel):  # it looks for pad tokens, and there are no values
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
    return twin


def _run(twin: Any) -> torch.Tensor:
    return twin(input_ids=torch.ones(1, 8, dtype=torch.int64, device="meta")).logits


def _calls(twin: Any) -> list[tuple[str, Any]]:
    """Return the names of the modules in the order in which they end, and the first tensor that each returns."""
    calls: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, _first_tensor(output))))
        for name, module in twin.named_modules()
    ]
    with torch.no_grad():
        _run(twin)
    for hook in hooks:
        hook.remove()
    return calls


def _reads_first_only(twin: Any, states: str) -> bool:
    """Return whether the head reads the state of the first token only: the graph of the gradient says what it reads."""
    leaves: list[torch.Tensor] = []

    def cut(module: nn.Module, args: tuple, output: Any) -> Any:
        leaves.append(_first_tensor(output).detach().requires_grad_())
        return _replace_first(output, leaves[-1])

    twin.get_submodule(states).register_forward_hook(cut)
    with torch.enable_grad():
        nodes: list[Any] = [_run(twin).grad_fn]
    seen, readers = set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions]
        readers += [node for child in children if any(getattr(child, "variable", None) is leaf for leaf in leaves)]
        nodes += children
    return bool(readers) and all(
        node.name() == "SelectBackward0" and (node._saved_dim, node._saved_index) == (1, 0) for node in readers
    )


def _first_tensor(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output[0]


def _replace_first(output: Any, tensor: torch.Tensor) -> Any:
    """Return an output of a module with another first tensor; transformers' outputs are dicts with an order."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    output[next(iter(output))] = tensor
    return output
