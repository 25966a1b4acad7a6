"""Adapters on a model whose weights are elsewhere: attached by PEFT, their weights put in place when they are asked for."""

import re
import warnings
from copy import deepcopy
from typing import Any, NamedTuple

import accel_llm.system.chatter

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PEFT_PREFIX, SavedAdapter
from accel_llm.errors import ConfigError
from accel_llm.merge.one_module import plain_module
from accel_llm.merge.skeleton import Skeleton
from accel_llm.model.loading import short_reason
from accel_llm.system.memory import release_pages

# Methods whose weights are all in their files. Others draw some from a seed, or compute them from the base's weights.
STORED_METHODS = [
    "LORA",
    "ADALORA",
    "LOHA",
    "LOKR",
    "OFT",
    "BOFT",
    "HRA",
    "VERA",
    "IA3",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
    "MISS",
    "C3A",
    "ROAD",
    "DELORA",
    "FOURIERFT",
    "VBLORA",
]
# Ways to begin that take something away from the base's weights, or are computed from them.
FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
COMBINED = "combined"
# Names that PEFT has for a weight at every layer though all of them share one, or though it draws it from a seed.
SHARED_TENSORS = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")


class AttachedAdapters(NamedTuple):
    """`pending` are adapter weights by the name of their place in `wrapped`, `replaced` base weights that an adapter's
    file has whole, by their name in the base. `owners` are the module and attribute that hold each weight of the base.
    """

    wrapped: Any
    pending: dict[str, torch.Tensor]
    replaced: dict[str, torch.Tensor]
    owners: dict[str, tuple[nn.Module, str]]


def can_be_lazy(adapters: list[SavedAdapter]) -> bool:
    """Whether an adapter can be attached to a base without weights, so that memory is bounded by the largest layer."""
    config: Any = adapters[0].config
    begun = str(getattr(config, "init_lora_weights", "")).lower()
    stored = config.peft_type in STORED_METHODS and getattr(config, "save_projection", True)
    return len(adapters) == 1 and stored and not begun.startswith(FROM_BASE)


def check_mergeable(adapter: SavedAdapter) -> None:
    """Raises ConfigError for a method that has no weights to add to a layer's."""
    kind, folder = PeftType(adapter.config.peft_type), adapter.folder
    why = None
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        why = f"a {kind.value} adapter has no weights to add"
    elif getattr(adapter.config, "layer_replication", None):
        why = "layer_replication makes another model, with more layers than its base"
    elif getattr(adapter.config, "alora_invocation_tokens", None):
        why = "an activated LoRA (alora_invocation_tokens) is in force for a part of the text only"
    if why:
        raise ConfigError(f"adapter: {folder} cannot be merged, {why}.")


def attach_adapters(layout: Skeleton, adapters: list[SavedAdapter], lazy: bool) -> AttachedAdapters | None:
    """Attach all `adapters` to the layout's model; None if `lazy` and one has weights that are not in its file.

    Raises:
        ConfigError: an adapter that does not fit the model.
    """
    model = layout.model
    owners = {name: _owner(model, name) for name in model.state_dict()}
    base = {id(getattr(*place)): name for name, place in reversed(owners.items())}
    names = ["default"] if len(adapters) == 1 else [f"adapter{k}" for k in range(len(adapters))]
    wrapped: Any = None
    found: dict[str, torch.Tensor] = {}
    for name, adapter in zip(names, adapters, strict=True):
        try:
            wrapped = _attach(wrapped or model, adapter, name, lazy)
            found |= _by_place(wrapped, adapter.weights, name)
            if not _check_fit(wrapped, base, found, adapter, name) and lazy:
                return None
        except KeyError as error:  # PEFT 0.21 looks modules_to_save up by name
            raise ConfigError(f"adapter: {adapter.folder} does not fit its base (it lacks {error}).") from None
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise ConfigError(f"adapter: {adapter.folder} does not fit its base ({short_reason(error)}).") from None
    state = wrapped.state_dict(keep_vars=True)
    replaced = {base[id(state[key])]: tensor for key, tensor in found.items() if id(state[key]) in base}
    pending = {key: tensor for key, tensor in found.items() if id(state[key]) not in base}
    made = AttachedAdapters(wrapped, pending, replaced, owners)
    if lazy:  # what all layers share stands in none of them
        layers = tuple(f"{PEFT_PREFIX}{key}." for key, _ in adapted_modules(wrapped))
        fill_pending(made, [key for key in pending if not key.startswith(layers)])
    else:
        fill_pending(made, list(pending))
    return made


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _attach(model: Any, adapter: SavedAdapter, name: str, lazy: bool) -> PeftModel:
    config: Any = deepcopy(adapter.config)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear":
        # A text is a pattern for the whole name; some meant the last part of one.
        whole = [key for key, _ in model.named_modules()]
        if not any(re.fullmatch(targets, key) for key in whole):
            config.target_modules = [targets]
    with warnings.catch_warnings():
        # Of fan_in_fan_out, which PEFT corrects itself, and of tied embeddings, which are looked after here.
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=lazy)
            return model
        family = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        return family(model, config, name, low_cpu_mem_usage=lazy).eval()


def _by_place(wrapped: Any, weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """`weights` by their names in `wrapped`, as PEFT converts them.

    PEFT 0.21 would load them at once: into a base on the meta device nothing, or what it loads becomes as narrow as it.
    """
    found: dict[str, torch.Tensor] = {}
    wrapped.load_state_dict = lambda state, **_: found.update(state)
    try:
        set_peft_model_state_dict(wrapped, weights, adapter_name=name)
    finally:
        del wrapped.load_state_dict
    return found


def _check_fit(
    wrapped: Any, base: dict[int, str], found: dict[str, torch.Tensor], adapter: SavedAdapter, name: str
) -> bool:
    """Whether the adapter's file has all weights that the attached adapter has.

    Raises:
        ValueError: it has weights that find no place, of another shape, or none for a layer that it adapts.
    """
    state = wrapped.state_dict(keep_vars=True)
    if unused := found.keys() - state.keys():
        raise ValueError(f"{len(unused)} of its weights have no place there, such as {min(unused)}")
    wrong = [key for key, tensor in found.items() if tensor.shape != state[key].shape]
    if wrong:
        first = min(wrong)
        shapes = f"{tuple(found[first].shape)} for {tuple(state[first].shape)}"
        raise ValueError(f"{len(wrong)} of its weights have another shape, such as {first}, {shapes}")
    missing = {key for key, tensor in state.items() if id(tensor) not in base} - found.keys()
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(adapter.config.peft_type), "?")
    needed = [key for key in missing if f".{own}" in key and not any(shared in key for shared in SHARED_TENSORS)]
    needed += [key for key in missing if f".modules_to_save.{name}." in key]
    if needed:
        raise ValueError(f"it lacks {len(needed)} weights that it would have there, such as {min(needed)}")
    return not missing


def adapted_modules(wrapped: Any) -> list[tuple[str, Any]]:
    """The adapted modules by name, outermost first where they are nested."""
    found: list[tuple[str, Any]] = []
    for name, module in wrapped.base_model.model.named_modules():
        inside = found and name.startswith(f"{found[-1][0]}.")
        if not inside and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found.append((name, module))
    return found


def fill_pending(made: AttachedAdapters, keys: list[str]) -> None:
    """Put pending adapter weights in place, in the dtype that PEFT merges them in."""
    for key in keys:
        tensor = made.pending.pop(key)
        parent, attribute = _owner(made.wrapped, key)
        put_tensor(parent, attribute, tensor.to(getattr(parent, attribute).dtype, copy=True))
        release_pages(tensor)


def put_tensor(module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer of this name."""
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor


def combine_adapters(made: AttachedAdapters, weights: list[float], how: str, density: float, seed: int) -> None:
    """Make one adapter of several, and the active one (PEFT's `add_weighted_adapter`); dare draws by `seed` what it drops.

    Raises:
        ConfigError: adapters that cannot be combined so.
    """
    wrapped = made.wrapped
    adapters = list(wrapped.peft_config)
    if not hasattr(wrapped.base_model, "add_weighted_adapter"):
        raise ConfigError(f"adapter: {wrapped.peft_type} adapters cannot be combined; merge one after the other.")
    if any(isinstance(module, AuxiliaryTrainingWrapper) for _, module in adapted_modules(wrapped)) or made.replaced:
        raise ConfigError(
            "adapter: adapters with whole modules (modules_to_save, trained tokens, biases) cannot be combined; merge one "
            "after the other."
        )
    settings: dict[str, Any] = {} if how in ("cat", "linear") else {"density": density}
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            wrapped.add_weighted_adapter(adapters, weights, COMBINED, combination_type=how, **settings)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"combination_type: {how} cannot combine these adapters ({short_reason(error)}).") from None
    wrapped.set_adapter(COMBINED)


def untie_head(model: PreTrainedModel, made: AttachedAdapters) -> bool:
    """Give the head a matrix of its own where the adapter makes it another than the embedding's, and say so.

    Merged into the one they share, a change of one would be a change of both.
    """
    ends = [
        plain_module(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
    ]
    if len(ends) < 2 or ends[0].weight is not ends[1].weight or not _differ(model, made):
        return False
    ends[1].weight = nn.Parameter(ends[0].weight.detach().clone(), requires_grad=False)
    return True


def _differ(model: PreTrainedModel, made: AttachedAdapters) -> bool:
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if all(isinstance(end, TrainableTokensWrapper) for end in ends):
        return not ends[1].token_adapter.tied_adapter
    saved = [_saved(model, made, end) for end in ends]
    if all(tensor is not None for tensor in saved):
        return not torch.equal(*saved)  # type: ignore[arg-type]
    return any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends)


def _saved(model: PreTrainedModel, made: AttachedAdapters, module: Any) -> torch.Tensor | None:
    """The whole matrix that the adapter has for a module."""
    if not isinstance(module, ModulesToSaveWrapper):
        return None
    name = next(name for name, found in model.named_modules() if found is module)
    return made.pending.get(f"{PEFT_PREFIX}{name}.modules_to_save.default.weight")


def load_adapter(model: PreTrainedModel, adapter: SavedAdapter) -> Any:
    """`model`, whose weights are in memory, with `adapter` on it, ready to be used.

    Raises:
        ConfigError: they are not made for each other.
    """
    base = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        wrapped: Any = _attach(model, adapter, "default", lazy=False)
        found = _by_place(wrapped, adapter.weights, "default")
        _check_fit(wrapped, base, found, adapter, "default")
        wrapped.load_state_dict(found, strict=False)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"adapter: {adapter.folder} does not fit its base ({short_reason(error)}).") from None
    return wrapped
