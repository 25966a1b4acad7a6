"""Methods that train a part of the model itself and keep the rest: freeze (what the options name) and bitfit (biases)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, StrictBool
from torch import nn

from accel_llm.adapters.method_options import check_method_options
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.classifier import head_modules
from accel_llm.model.language_part import parts_beside_language
from accel_llm.system.launcher import process_rank

PARTIAL_METHODS = ("freeze", "bitfit")
# Balances the experts of a mixture from outside: it gets no gradient.
UNTRAINABLE = "e_score_correction_bias"


@dataclass
class FreezeOptions:
    """The `method_options` of freeze. Everything that one of them names is trained.

    `layers` are so many of the last layers, or the numbers of layers, from 0. `modules` are names inside the layers,
    such as mlp: only they are trained, in `layers` or, without that, in all layers. `parameters` are regular
    expressions; a parameter is trained if its name has a match. `norms` are all normalisations, those between and
    behind the layers too.
    """

    layers: PositiveInt | list[NonNegativeInt] | None = None
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    embeddings: StrictBool = False
    head: StrictBool = False
    norms: StrictBool = False


@dataclass
class BitFitOptions:
    """BitFit has no options: it trains all biases (Ben Zaken et al. 2021, arXiv 2106.10199)."""


def check_partial_options(options: MethodOptions) -> None:
    """Check the `method_options` of freeze or bitfit before a model is loaded.

    Raises:
        ConfigError: one of them is unknown, or has a value that is not allowed.
    """
    if options.method == "freeze":
        _freeze_options(options)
    elif options.method_options:
        names = ", ".join(options.method_options)
        raise ConfigError(f"method_options: method {options.method} has none; remove {names}.")


def _freeze_options(options: MethodOptions) -> FreezeOptions:
    """Return the options of freeze, checked without a model.

    Raises:
        ConfigError: one of them is unknown, has a value that is not allowed, or nothing would be trained.
    """
    values = {
        name: [value] if name in ("modules", "parameters") and isinstance(value, str) else value
        for name, value in options.method_options.items()
    }
    chosen = FreezeOptions(**check_method_options("freeze", values, FreezeOptions))
    problems = []
    for pattern in chosen.parameters:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"method_options: parameters {pattern!r} is not a regular expression ({error}).")
    if not any(vars(chosen).values()):
        problems.append(
            "method_options: method freeze trains nothing; give layers, modules, parameters, embeddings, head or norms."
        )
    raise_problems(problems)
    return chosen


def train_part(model: nn.Module, options: MethodOptions, new_tokens: range = range(0)) -> None:
    """Freeze all weights of `model` but those that the method trains, and say how many those are. Others: no effect.

    Raises:
        ConfigError: the model does not have what the options name, or rows of `new_tokens` would not be trained.
    """
    if options.method not in PARTIAL_METHODS:
        return
    names = parameters_of_part(model, options)
    if new_tokens and not _with_same_weight(model, _vocabulary(model)) <= names:
        raise ConfigError(
            f"add_tokens: method {options.method} would not train the rows of the new tokens; use method freeze with "
            "method_options: {embeddings: true, head: true}, or method lora."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if process_rank() == 0:
        chosen = dict(model.named_parameters())
        count, total = sum(chosen[name].numel() for name in names), sum(p.numel() for p in chosen.values())
        print(f"method {options.method}: {count:,} of {total:,} weights are trained{_tied_note(model)}", flush=True)


def _tied_note(model: nn.Module) -> str:
    """Say that the embedding and the head are one matrix, if they are and it is trained."""
    embedding, head = (getattr(module, "weight", None) for module in _vocabulary(model))
    if embedding is None or embedding is not head or not embedding.requires_grad:
        return ""
    return "; the embedding and the head are one matrix, so both are"


def parameters_of_part(model: nn.Module, options: MethodOptions) -> set[str]:
    """Return the names of the parameters that the method trains. The model may be sharded.

    The head of a model that gives scores is always among them.

    Raises:
        ConfigError: the model does not have what the options name.
    """
    beside = tuple(f"{name}." for name in parts_beside_language(model))
    names = [
        name for name, _ in model.named_parameters() if not name.startswith(beside) and not name.endswith(UNTRAINABLE)
    ]
    if options.method == "bitfit":
        biases = {name for name in names if re.search(r"[._]bias$", name)}
        if not biases:
            raise ConfigError(
                f"method: bitfit trains biases, and {type(unwrap_causal_lm(model)).__name__} has no biases; use ln_tuning "
                "or freeze with method_options: {norms: true}."
            )
        return biases | _head_of_scores(model)
    return _parameters_to_unfreeze(model, names, _freeze_options(options)) | _head_of_scores(model)


def _parameters_to_unfreeze(model: nn.Module, names: list[str], chosen: FreezeOptions) -> set[str]:
    """Return those of `names` that the options of freeze name.

    Raises:
        ConfigError: the model does not have what they name.
    """
    trained: set[str] = set()
    problems: list[str] = []
    if chosen.layers or chosen.modules:
        trained |= _in_layers(model, names, chosen, problems)
    for pattern in chosen.parameters:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            problems.append(f"method_options: parameters {pattern!r} matches no name, such as {names[-1]}.")
        trained |= found
    inner: Any = unwrap_causal_lm(model)
    norms = [module for module in model.modules() if re.search("norm$", type(module).__name__, re.IGNORECASE)]
    embedding, head = _vocabulary(model)
    for wanted, modules in ((chosen.embeddings, [embedding]), (chosen.head, [head]), (chosen.norms, norms)):
        trained |= _with_same_weight(model, modules if wanted else []) & set(names)
    raise_problems(problems)
    if not trained:
        raise ConfigError(f"method_options: {type(inner).__name__} has no weights that the options of freeze name.")
    return trained


def _head_of_scores(model: nn.Module) -> set[str]:
    return _with_same_weight(model, [part for head in head_modules(model) for part in head.modules()])


def _vocabulary(model: nn.Module) -> list[nn.Module | None]:
    inner: Any = unwrap_causal_lm(model)
    return [inner.get_input_embeddings(), inner.get_output_embeddings()]


def _with_same_weight(model: nn.Module, modules: Sequence[nn.Module | None]) -> set[str]:
    """Return the names in `model` of the parameters of `modules`; one that several modules share has one name."""
    own = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _in_layers(model: nn.Module, names: list[str], chosen: FreezeOptions, problems: list[str]) -> set[str]:
    """Return the parameters of the chosen layers, or of the chosen modules in them; add what is wrong to `problems`."""
    path, count = _layer_list(model)
    numbers = chosen.layers if isinstance(chosen.layers, list) else range(count - (chosen.layers or count), count)
    if wrong := [number for number in numbers if not 0 <= number < count]:
        given = chosen.layers if isinstance(chosen.layers, int) else wrong[0]
        problems.append(
            f"method_options: layers {given} is not in the model, which has {count} layers; numbers begin with 0."
        )
        return set()
    inside = {
        name: name.removeprefix(f"{path}.{number}")
        for number in numbers
        for name in names
        if name.startswith(f"{path}.{number}.")
    }
    for module in chosen.modules:
        if not any(f".{module}." in rest for rest in inside.values()):
            parts = sorted({rest.split(".")[1] for rest in inside.values()})
            problems.append(
                f"method_options: modules {module!r} is not in these layers, which have {', '.join(parts)}."
            )
    return {
        name
        for name, rest in inside.items()
        if not chosen.modules or any(f".{module}." in rest for module in chosen.modules)
    }


def _layer_list(model: nn.Module) -> tuple[str, int]:
    """Return the name of the list of decoder layers in `model`, and their number."""
    inner = unwrap_causal_lm(model)
    count = inner.config.get_text_config().num_hidden_layers
    language = set((inner.get_decoder() or inner).modules())
    path = next(
        name
        for name, module in model.named_modules()
        if module in language and isinstance(module, nn.ModuleList) and len(module) == count
    )
    return path, count


def last_layers(options: MethodOptions) -> int | None:
    """Return how many of the last layers are trained otherwise than those before; None if layers may differ anyhow."""
    if options.method != "freeze":
        return 0
    chosen = _freeze_options(options)
    if isinstance(chosen.layers, list) or chosen.parameters:
        return None
    return chosen.layers or 0
