"""A model with a head that gives scores of a whole text: the config, the head, and scores at the last tokens.

transformers has a class `...ForSequenceClassification` for each family: the decoder and `score`, a linear layer without
bias. Its own forward takes the score of a row at the last token that is not the pad token, so packed rows have one score,
and a text that ends with the pad token gets that of an earlier one. Ours takes the scores at places that it is told.
"""

import functools
import inspect
import math
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from accel_llm.data.batches import collate_packed, collate_padded, to_device
from accel_llm.errors import ConfigError
from accel_llm.model.attention import PACKED_ATTENTION, forward_arguments, stock_attention, unwrap_causal_lm
from accel_llm.model.encoders import attach_encoder, compute_in_float32, head_names, keep_balance
from accel_llm.model.language_part import causal_lm_loader
from accel_llm.system.launcher import process_rank

HEAD = "score"  # the head of all decoders in transformers
REWARD_LABEL = "reward"
TEXTS = 8  # so many beginnings of a row get a score where logits are compared
# Relative differences of scores that rounding explains, by the dtype of the matrix products.
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.int8: 1e-1}


def has_scores(config: PreTrainedConfig) -> bool:
    """Return whether a config is that of a model that gives scores."""
    return str((config.architectures or [""])[0]).endswith("ForSequenceClassification")


def model_loader(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads a model of this config: one that gives scores, or a language model."""
    return AutoModelForSequenceClassification if has_scores(config) else causal_lm_loader(config)


def check_gives_tokens(config: PreTrainedConfig, name: str, field: str) -> None:
    """Check that a model that gives scores is not taken for a language model; `field` is the option to name in an error.

    Raises:
        ConfigError: its head gives scores.
    """
    if has_scores(config):
        raise ConfigError(
            f"{field}: {name} is a reward model or a classifier, whose head gives scores and no answers; name a language "
            "model, let it score texts with launch/predict.py, or train it further with launch/reward.py or "
            "launch/classify.py."
        )


def check_gives_scores(config: PreTrainedConfig, name: str, rewards: bool) -> None:
    """Check that a classifier can be made of the model `name`, or is it; with `rewards`: a reward model.

    Raises:
        ConfigError: transformers has no such model, or a reward model is to be made of a classifier of several classes.
    """
    family, mapping = type(config).__name__.removesuffix("Config"), AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping or config.get_text_config() is not config:
        raise ConfigError(
            f"model_name_or_path: transformers has no text model with scores of the family {family}; use a model of "
            "another family, such as Llama, Qwen3, Mistral or Gemma 2."
        )
    if rewards and has_scores(config) and config.num_labels != 1:
        raise ConfigError(
            f"model_name_or_path: {name} is a classifier of {config.num_labels} classes, but a reward is one score; name "
            "a reward model or a language model."
        )
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "output_router_logits: the config of the model asks for a balance loss of its experts, but transformers "
            "computes none with scores; set it to false in config.json."
        )


def scores_last_token(config: PreTrainedConfig) -> bool:
    """Return whether the family is that of a decoder, whose head `score` reads the last token that is not the pad token."""
    model_class: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
    generic = issubclass(model_class, GenericForSequenceClassification)
    return generic or f"self.{HEAD} =" in inspect.getsource(model_class.__init__)


def score_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a reward model made of a model of `config`.

    It is one score, which transformers' pipeline for text classification returns as it is ("regression").
    """
    config = deepcopy(config)
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    config.num_labels, config.problem_type = 1, "regression"
    config.id2label, config.label2id = {0: REWARD_LABEL}, {REWARD_LABEL: 0}
    if type(config) in mapping:
        config.architectures = [mapping[type(config)].__name__]
    return config


def start_head(model: PreTrainedModel, missing: set[str], announce: bool = True) -> None:
    """Take the weights of the head that are new, because the files lack them, out of `missing`; `announce` says which.

    transformers has drawn them as the family does. The head of a new reward model is drawn here: normal with variance
    1 / (width + 1), so that its scores vary by about 1, in any family (Huang et al. 2024, arXiv 2403.17031, section
    3.3). The caller sets the seed. `model.drawn` are the names of what is new.
    """
    names = head_names(model)
    new = {key for key in missing if key.startswith(tuple(f"{name}." for name in names))}
    missing -= new
    model.drawn = sorted(new)  # type: ignore[assignment]
    head: Any = getattr(model, HEAD, None)
    if new and isinstance(head, nn.Linear) and model.config.id2label == {0: REWARD_LABEL}:
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape) / math.sqrt(head.in_features + 1))
    if announce and process_rank() == 0:
        from_files = [name for name in names if not any(key.startswith(f"{name}.") for key in new)]
        parts = [f"{', '.join(from_files)} of the model's files"] if from_files else []
        drawn = [name for name in names if name not in from_files]
        parts += [f"{', '.join(drawn)} new, with first values by the seed"] if drawn else []
        count: Any = model.config.num_labels
        print(f"head: {'; '.join(parts)} ({count} score{'s' * (count > 1)} for a text)", flush=True)


def head_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the head of a model that gives scores, of another model none; PEFT may have wrapped it."""
    inner = unwrap_causal_lm(model)
    return [inner.get_submodule(name) for name in head_names(inner)] if has_scores(inner.config) else []


def attach_scores(model: PreTrainedModel) -> None:
    """Let the forward of a model with a score head return scores at given places, float32 [n, labels].

    `answer_scores` and `text_scores` pass them; without `targets` the forward stays the family's own. Call it before PEFT
    wraps the model and before `accelerator.prepare`. The head computes in float32, whatever the dtype of the decoder is.
    A model with another head (an encoder) keeps it, see model/encoders.py.
    """
    head: Any = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear):
        attach_encoder(model)
        return

    # `wraps` keeps the signature: PEFT reads from it which inputs the model takes.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args, targets: dict[str, Any] | None = None, labels: Any = None, **kwargs):
        if targets is None:
            return type(self).forward(self, *args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs)[0]
        if targets["places"] is None:  # for the tests of a model: the states of all tokens
            return SequenceClassifierOutput(logits=hidden)
        return SequenceClassifierOutput(logits=self.score(hidden.flatten(0, 1).index_select(0, targets["places"])))

    head.forward = MethodType(compute_in_float32, head)
    model.forward = MethodType(forward, model)


def answer_scores(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the scores of the answers of a batch, float32 [answers, labels]: at the last token of each.

    Call `attach_scores` on the model first; after that it may be wrapped (PEFT, DDP, DeepSpeed, FSDP2). The batch is
    packed or padded, and `last_positions`, int64 [answers], are places in its flattened rows (data/answers.py).
    """
    output = model(**forward_arguments(batch), targets={"places": batch["last_positions"]}, use_cache=False)
    return keep_balance(output.logits, output)


def token_states(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return what the head of a model that gives scores reads: [rows, tokens, width]."""
    return model(**inputs, targets={"places": None}, use_cache=False).logits


def logits_to_compare(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a row of tokens [1, n], float32 [1, n, vocabulary], by the family's own forward.

    Of a model that gives scores they are those of beginnings of the row, [1, texts, labels]: one alone may be near 0.
    """
    if not has_scores(unwrap_causal_lm(model).config):
        return model(input_ids=ids).logits.float()
    ends = sorted({max(1, ids.shape[1] * k // TEXTS) for k in range(1, TEXTS + 1)})
    return torch.stack([model(input_ids=ids[:, :end]).logits.float() for end in ends], 1)


@torch.no_grad()
def check_scores(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> str:
    """Compare our scores of three rows in one batch with the family's own of each row alone; `model` may be wrapped.

    `dtype` is the dtype of the matrix products. Every rank runs the same 4 forwards. Returns the path for run.json.

    Raises:
        ConfigError: they differ.
    """
    inner, training = unwrap_causal_lm(model), model.training
    model.eval()
    config = inner.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(config.vocab_size - 1, (n,), generator=generator) for n in (12, 5, 9)]
    if config.pad_token_id is not None:  # no token is the pad token, at which the family takes no score
        rows = [ids + (ids >= config.pad_token_id) for ids in rows]
    with stock_attention(model):
        alone = [model(input_ids=ids[None].to(device), use_cache=False).logits for ids in rows]
    arrays = [(ids.numpy(), ids.numpy()) for ids in rows]
    packed = inner.config._attn_implementation == PACKED_ATTENTION
    batch = to_device(collate_packed(arrays) if packed else collate_padded(arrays, 0), device)
    places, start = [], 0
    for ids in rows:
        places.append(start + len(ids) - 1)
        start += len(ids) if packed else batch["input_ids"].shape[1]
    scores = answer_scores(model, batch | {"last_positions": torch.tensor(places, device=device)})
    model.train(training)
    expected = torch.cat(alone).float()
    difference = float((scores - expected).norm() / expected.norm())
    if not difference <= SCORE_TOLERANCE[dtype]:
        raise ConfigError(
            f"model_name_or_path: {type(inner).__name__} cannot be trained here: its own scores of test rows differ from "
            f"those at their last tokens by {difference:.1e} (relative; allowed is {SCORE_TOLERANCE[dtype]:.0e}); use a "
            "model of another family."
        )
    return "scores"
