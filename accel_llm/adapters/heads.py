"""The head of a model that gives scores, as a part of its adapter: trained and saved whole, and never left random."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from accel_llm.adapters.saved import ADAPTER_WEIGHTS, read_adapter_config
from accel_llm.config.method import MethodOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.classifier import HEAD, has_scores
from accel_llm.model.encoders import head_names


def saved_config(folder: Path) -> PreTrainedConfig | None:
    """Return the config of the classifier that an adapter belongs to, which says its labels; None if it has none beside it."""
    return AutoConfig.from_pretrained(str(folder)) if (folder / "config.json").is_file() else None


def count_saved_scores(folder: Path) -> int:
    """Return how many scores the head in an adapter's file gives, 0 if there is none.

    The layers before the last one are as wide as the model (BERT's pooler, RoBERTa's `dense`), so their matrices are square.
    """
    names = read_adapter_config(folder).get("modules_to_save") or []
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    heads = [shape for key, shape in shapes.items() if len(shape) == 2 and any(f".{name}." in key for name in names)]
    last = [shape for shape in heads if shape[0] != shape[1]] or heads
    return min((shape[0] for shape in last), default=0)


def heads_without_adapter(model: PreTrainedModel) -> list[str]:
    """Return the modules of a head that get no adapter, since they are trained whole, and that PEFT would not leave out.

    PEFT 0.21 leaves out `score` and the layer `classifier`, but not BERT's pooler or RoBERTa's `classifier.dense`.
    """
    return [name for name in head_names(model) if name != HEAD] if has_scores(model.config) else []


def save_head(options: MethodOptions, config: Any, model: PreTrainedModel) -> None:
    """Let the adapter train and save the head of a model that gives scores; one that is trained further says how much."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    names = [name for name in config.modules_to_save or [] if any(key.endswith(f".{name}") for key in modules)]
    if options.adapter_name_or_path is None:
        names += head_names(model)
    config.modules_to_save = list(dict.fromkeys(names))


def leave_out_heads(config: Any, layers: list[str]) -> None:
    """Take the names of layers of the head out of PEFT's list of targets, which the whole head has no adapter for.

    PEFT 0.21 lists all linear layers, also those that `exclude_modules` names, and finds no `bert.pooler.dense` when such
    an adapter is trained further. `layers` are the names of all modules before PEFT has wrapped them.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, set | list):
        return
    heads = tuple(f"{name}." for name in config.modules_to_save)

    def is_of_head(target: str) -> bool:
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        return bool(found) and all(f"{name}.".startswith(heads) for name in found)

    config.target_modules = type(targets)(target for target in targets if not is_of_head(target))


def check_head(model: Any, name: str) -> None:
    """Check that no weight of the head is random: each is in the files of the base or in the adapter.

    Raises:
        ConfigError: some are in neither.
    """
    inner, saved = unwrap_causal_lm(model), getattr(model.peft_config["default"], "modules_to_save", None) or []
    lost = [key for key in getattr(inner, "drawn", ()) if not any(f".{part}." in f".{key}" for part in saved)]
    if lost:
        raise ConfigError(
            f"adapter_name_or_path: neither {name} nor the files of its base hold {', '.join(lost)}, which its head "
            "needs; name in model_name_or_path the model that it was trained on, with its whole head."
        )
