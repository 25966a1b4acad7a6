"""Attaches adapters with PEFT to a model whose weights are not in memory, and fills the adapters' weights in later."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import accel_llm.system.chatter

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PEFT_PREFIX, SavedAdapter
from accel_llm.adapters.decompositions import Decompositions, decomposition_work
from accel_llm.adapters.fixed_parts import follow_projections, save_all_parts
from accel_llm.adapters.initial import check_own_start, subtracted_init
from accel_llm.adapters.methods import REFUSED_METHODS
from accel_llm.adapters.prompts import fit_virtual_tokens, load_ensemble, load_prompt
from accel_llm.backend.strategy import training_device
from accel_llm.errors import ConfigError
from accel_llm.merge.skeleton import Skeleton
from accel_llm.model.loading import describe_shape_mismatch, short_reason
from accel_llm.system.memory import release_pages

COMBINED_NAME = "combined"
OLD_ROWS = ".trainable_tokens_original."  # which PEFT needs only to take trained rows out again
# PEFT lists these weights in every layer, although all layers share one tensor or PEFT draws it from a seed.
SHARED_TENSORS = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")


class AttachedAdapters(NamedTuple):
    """A model with adapters on it.

    `pending`: adapter weights that are not in `wrapped` yet, by their name there. `replacements`: whole base weights
    that an adapter's file holds, by their name in the base. `owners`: module and attribute of each base weight.
    """

    wrapped: Any
    pending: dict[str, torch.Tensor]
    replacements: dict[str, torch.Tensor]
    owners: dict[str, tuple[nn.Module, str]]


def can_be_lazy(adapters: list[SavedAdapter]) -> bool:
    """Return whether to try to attach the adapter to a base without weights: then the largest module bounds memory."""
    config: Any = adapters[0].config
    init = subtracted_init(getattr(config, "init_lora_weights", True))  # PEFT needs the base's weights for it
    return len(adapters) == 1 and getattr(config, "save_projection", True) and not init


def check_mergeable(adapter: SavedAdapter, changed: bool = False) -> None:
    """Refuse an adapter that cannot be added to the weights of a layer.

    `changed` says that the adapter is scaled, combined with others, or taken out of a model.

    Raises:
        ConfigError: its method has no such weights, or it acts on a part of the text only.
    """
    kind, folder = PeftType(adapter.config.peft_type), adapter.folder
    reason = None
    # Prompts and prefixes have no tuner that adapts layers.
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        reason = f"a {kind.value} adapter has no weights to add"
    elif kind.value.lower() in REFUSED_METHODS:
        reason = f"a {kind.value} adapter is more than weights: {REFUSED_METHODS[kind.value.lower()]}"
    elif getattr(adapter.config, "sample_at_inference", False):
        reason = "it draws random numbers whenever it is used (sample_at_inference)"
    elif getattr(adapter.config, "layer_replication", None):
        reason = "layer_replication makes another model, with more layers than its base"
    elif getattr(adapter.config, "alora_invocation_tokens", None):
        reason = "an activated LoRA (alora_invocation_tokens) acts on a part of the text only"
    elif changed and (init := subtracted_init(getattr(adapter.config, "init_lora_weights", True))):
        reason = (
            f"init_lora_weights {init} took first values out of its base, so it can only be merged alone and as it is"
        )
    if reason:
        raise ConfigError(f"adapter: {folder} cannot be merged, {reason}.")


def attach_adapters(skeleton: Skeleton, adapters: list[SavedAdapter], lazy: bool) -> AttachedAdapters | None:
    """Attach all `adapters` to the skeleton's model. Returns None if `lazy` and a file does not hold all the weights.

    Raises:
        ConfigError: an adapter does not fit the model.
    """
    model = skeleton.model
    owners = {name: _find_owner(model, name) for name in model.state_dict()}
    # Base weights by identity: PEFT renames them when it wraps their modules.
    base = {id(getattr(*owner)): name for name, owner in reversed(owners.items())}
    # PEFT's own name for a single adapter, so that its weights are found under the usual names.
    names = ["default"] if len(adapters) == 1 else [f"adapter{k}" for k in range(len(adapters))]
    wrapped: Any = None
    weights: dict[str, torch.Tensor] = {}
    for name, adapter in zip(names, adapters, strict=True):
        try:
            wrapped = _attach(wrapped or model, adapter, name, lazy)
            renamed = _rename_weights(wrapped, adapter.weights, name)
            _check_start(wrapped, adapter, renamed, name)
            weights |= renamed
            if not _check_fit(wrapped, base, weights, adapter, name) and lazy:
                return None
        except ImportError as error:
            raise ConfigError(f"adapter: {adapter.folder} needs another package ({short_reason(error)}).") from None
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            if lazy:  # PEFT may have looked at weights that are not there; another error comes again with them
                return None
            if isinstance(error, KeyError):  # PEFT 0.21 looks modules_to_save up by name
                raise ConfigError(f"adapter: {adapter.folder} does not fit its base (it lacks {error}).") from None
            raise ConfigError(f"adapter: {adapter.folder} does not fit its base ({short_reason(error)}).") from None

    # Weights of the adapters are filled in later, or now; whole base weights are kept apart.
    state = wrapped.state_dict(keep_vars=True)
    replacements = {base[id(state[key])]: tensor for key, tensor in weights.items() if id(state[key]) in base}
    pending = {key: tensor for key, tensor in weights.items() if id(state[key]) not in base}
    attached = AttachedAdapters(wrapped, pending, replacements, owners)
    if lazy:  # tensors that all layers share belong to none of them
        layers = tuple(f"{PEFT_PREFIX}{key}." for key, _ in adapted_modules(wrapped))
        fill_pending(attached, [key for key in pending if not key.startswith(layers)])
    else:
        fill_pending(attached, list(pending))
        follow_projections(wrapped)
    return attached


def _find_owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _attach(model: Any, adapter: SavedAdapter, name: str, lazy: bool) -> PeftModel:
    config: Any = deepcopy(adapter.config)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear":
        # PEFT reads a string as a pattern for the whole name; some adapters mean the last part of a name.
        names = [key for key, _ in model.named_modules()]
        if not any(re.fullmatch(targets, key) for key in names):
            config.target_modules = [targets]
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=lazy)
        return model
    if config.is_prompt_learning and config.task_type is None:
        config.task_type = "CAUSAL_LM"  # PEFT's general class leaves the virtual tokens out
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    method = PeftType(config.peft_type).value.lower()
    with Decompositions(method, training_device(), decomposition_work(model, config)):
        wrapped = peft_class(model, config, name, low_cpu_mem_usage=lazy).eval()
    save_all_parts(wrapped)
    return wrapped


def _rename_weights(wrapped: Any, weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter's file by their names in `wrapped`, converted by PEFT but not loaded.

    PEFT 0.21 would load them at once. On the meta device that loads nothing, and elsewhere it casts them to the dtype
    of the parameters. So `load_state_dict` is replaced for this call, to get hold of the converted weights.
    """
    renamed: dict[str, torch.Tensor] = {}
    wrapped.load_state_dict = lambda state, **_: renamed.update(state)
    try:
        set_peft_model_state_dict(wrapped, weights, adapter_name=name)
    finally:
        del wrapped.load_state_dict
    return renamed


def _check_start(wrapped: Any, adapter: SavedAdapter, weights: dict[str, torch.Tensor], name: str) -> None:
    """Check that PEFT has taken the adapter's own first values out of the base; `weights` are not loaded yet."""
    if not subtracted_init(getattr(adapter.config, "init_lora_weights", True)):
        return
    keys = [key.removesuffix(f".lora_A.{name}.weight") for key in weights if key.endswith(f".lora_A.{name}.weight")]
    pairs = [(f"{key}.lora_A.{name}.weight", f"{key}.lora_B.{name}.weight") for key in keys]
    first = wrapped.state_dict()
    same_shapes = all(key in weights and weights[key].shape == first[key].shape for pair in pairs for key in pair)
    if same_shapes:  # otherwise `_check_fit` says what is wrong
        check_own_start(((weights[a], weights[b], first[a], first[b]) for a, b in pairs), str(adapter.folder))


def _check_fit(
    wrapped: Any, base: dict[int, str], weights: dict[str, torch.Tensor], adapter: SavedAdapter, name: str
) -> bool:
    """Return whether the adapter's file holds all weights of the attached adapter.

    Raises:
        ValueError: a weight of the file has no place in the model or a different shape, or a weight of an adapted
            layer is not in the file.
    """
    # `keep_vars` keeps the parameters themselves, so that base weights are recognized by identity.
    state = wrapped.state_dict(keep_vars=True)
    if unused := weights.keys() - state.keys():
        raise ValueError(f"{len(unused)} of its weights have no place in the model, such as {min(unused)}")
    shapes = [(key, tensor.shape, state[key].shape) for key, tensor in weights.items()]
    if mismatch := describe_shape_mismatch(s for s in shapes if s[1] != s[2]):
        raise ValueError(mismatch)
    # Weights that PEFT draws or computes itself may be missing; the others may not.
    missing = {key for key, tensor in state.items() if id(tensor) not in base} - weights.keys()
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(adapter.config.peft_type), "?")
    needed = [key for key in missing if f".{prefix}" in key and not any(shared in key for shared in SHARED_TENSORS)]
    needed += [key for key in missing if f".modules_to_save.{name}." in key]
    if needed:
        raise ValueError(f"{len(needed)} weights of its layers are missing in the file, such as {min(needed)}")
    # What PEFT computes from the base and never saves is empty if the base is.
    empty = [key for key, tensor in wrapped.named_buffers() if key not in state and tensor.is_meta]
    return not missing and not any(name in key.split(".") and OLD_ROWS not in key for key in empty)


def adapted_modules(wrapped: Any) -> list[tuple[str, Any]]:
    """Return the names and modules that are adapted; of nested ones only the outermost."""
    modules: list[tuple[str, Any]] = []
    for name, module in wrapped.base_model.model.named_modules():
        inside = modules and name.startswith(f"{modules[-1][0]}.")
        if not inside and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            modules.append((name, module))
    return modules


def fill_pending(attached: AttachedAdapters, keys: list[str]) -> None:
    """Put pending adapter weights into the model, in the dtype in which PEFT merges them."""
    for key in keys:
        tensor = attached.pending.pop(key)
        parent, attribute = _find_owner(attached.wrapped, key)
        put_tensor(parent, attribute, tensor.to(getattr(parent, attribute).dtype, copy=True))
        release_pages(tensor)


def put_tensor(module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer of this name."""
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor


def combine_adapters(attached: AttachedAdapters, weights: list[float], how: str, density: float, seed: int) -> None:
    """Combine several adapters into one, which becomes the active one (PEFT's `add_weighted_adapter`).

    `density` is the share of values that ties and dare keep; dare draws them with `seed`.

    Raises:
        ConfigError: these adapters cannot be combined in this way.
    """
    wrapped = attached.wrapped
    adapters = list(wrapped.peft_config)
    if not hasattr(wrapped.base_model, "add_weighted_adapter"):
        raise ConfigError(f"adapter: {wrapped.peft_type} adapters cannot be combined; merge one after the other.")
    saved_modules = any(isinstance(module, AuxiliaryTrainingWrapper) for _, module in adapted_modules(wrapped))
    if saved_modules or attached.replacements:
        raise ConfigError(
            "adapter: adapters with whole modules (modules_to_save, trained tokens, biases) cannot be combined; merge "
            "one after the other."
        )
    # dare draws random numbers; the generator of the caller is left as it was.
    settings: dict[str, Any] = {} if how in ("cat", "linear") else {"density": density}
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            wrapped.add_weighted_adapter(adapters, weights, COMBINED_NAME, combination_type=how, **settings)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"combination_type: {how} cannot combine these adapters ({short_reason(error)}).") from None
    wrapped.set_adapter(COMBINED_NAME)


def check_usable(adapter: SavedAdapter, scores: bool = False) -> None:
    """Refuse an adapter that cannot answer questions or, with `scores`, that gives a classifier virtual tokens.

    Raises:
        ConfigError: its method needs more than a text, or it was trained for another task.
    """
    kind = PeftType(adapter.config.peft_type).value
    if not scores:
        check_answers(adapter.folder, adapter.config.task_type)
    if reason := REFUSED_METHODS.get(kind.lower()):
        raise ConfigError(f"adapter: {adapter.folder} is a {kind} adapter, which cannot be asked here: {reason}.")
    if scores and adapter.config.is_prompt_learning:
        raise ConfigError(
            f"adapter: {adapter.folder} is a {kind} adapter, whose virtual tokens no classifier is asked with here; train "
            "one that adapts layers, such as LoRA."
        )


def check_answers(folder: Path, task: str | None) -> None:
    """Check that an adapter for `task`, a task type of PEFT, can answer questions.

    Raises:
        ConfigError: it gives scores, or was trained for something else.
    """
    if task == "SEQ_CLS":
        raise ConfigError(
            f"adapter: {folder} is that of a reward model or a classifier, which gives scores and no answers; let it score "
            "texts with launch/predict.py."
        )
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"adapter: {folder} was trained for {task}; only adapters of causal LMs can be loaded.")


def load_adapter(model: PreTrainedModel, adapter: SavedAdapter) -> Any:
    """Put `adapter` on `model`, whose weights are in memory, ready for use. No weight of `model` changes in place.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    base = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        wrapped: Any = _attach(model, adapter, "default", lazy=False)
        if wrapped.peft_config["default"].is_prompt_learning:
            load_prompt(wrapped, adapter.weights, str(adapter.folder), "adapter")
            load_ensemble(wrapped, adapter.folder, "adapter")
            fit_virtual_tokens(wrapped)
            return wrapped
        weights = _rename_weights(wrapped, adapter.weights, "default")
        _check_start(wrapped, adapter, weights, "default")
        _check_fit(wrapped, base, weights, adapter, "default")
        state = wrapped.state_dict(keep_vars=True)
        for tensor in (state[name] for name in weights if id(state[name]) in base):
            tensor.data = tensor.data.clone()  # of the base, such as a bias that was trained
        wrapped.load_state_dict(weights, strict=False)
        follow_projections(wrapped)
    except ImportError as error:
        raise ConfigError(f"adapter: {adapter.folder} needs another package ({short_reason(error)}).") from None
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"adapter: {adapter.folder} does not fit its base ({short_reason(error)}).") from None
    return wrapped
