"""Estimates the memory of one device before any weight is read."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from accel_llm.config.options import TrainOptions


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device at the peak of a step: weights, trained, checkpoints, peak, context, in this order."""

    terms: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(self.terms.values())


def estimate_memory(
    options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str = "cuda"
) -> MemoryEstimate:
    """Return the estimate for one device of `processes` that train a model of this config."""
    text: Any = config.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    tokens = options.per_device_train_batch_size * options.max_length
    per_weight = {"qlora": 0.52, "lora": 2, "full": 4}[options.method]
    adapter = layers * options.lora_r * (8 * hidden + 3 * (hidden + inner))
    trained = 12 * (linear + 2 * vocabulary * hidden if options.method == "full" else adapter)
    layer = tokens * (30 * hidden + 18 * inner)
    stored = 2 * tokens * hidden if options.gradient_checkpointing else layer
    return MemoryEstimate(
        {
            "weights": int(per_weight * linear + 4 * vocabulary * hidden),
            "trained": trained,
            "checkpoints": layers * stored,
            "peak": layer,
            "context": 2**30 if device_type == "cuda" else 0,
        }
    )


def memory_savings(
    options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str = "cuda"
) -> list[tuple[str, int]]:
    """Return changes of settings that save memory, each as a person types it, with the bytes it saves, largest first."""
    total = estimate_memory(options, config, processes, device_type).total
    changes: list[tuple[str, dict[str, Any]]] = []
    if not options.gradient_checkpointing:
        changes.append(("gradient_checkpointing: true", {"gradient_checkpointing": True}))
    half = options.max_length // 2
    changes.append((f"max_length: {half}", {"max_length": half}))
    savings = [
        (text, total - estimate_memory(options.model_copy(update=change), config, processes, device_type).total)
        for text, change in changes
    ]
    return sorted((saving for saving in savings if saving[1] > 0), key=lambda saving: -saving[1])
