"""How many parameters a model has: in all, without embeddings, and, of a mixture of experts, those that one token uses."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.language_part import causal_lm_class
from accel_llm.model.meta_device import build_on_meta
from accel_llm.system.quiet import quietly

# Fields with the number of experts that each token is sent to.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. A weight that two modules share counts once.

    `body` are those that are neither in an embedding (of tokens or positions) nor in the output projection, which the
    cards of Qwen call non-embedding. `active` are all but the experts that a token is not sent to, embeddings included,
    as the papers of Mixtral and Qwen3 count; None if there are no experts.
    """

    total: int
    body: int
    active: int | None = None

    def describe(self) -> str:
        """Return the counts as the end of a sentence about the model."""
        active = "" if self.active is None else f", {self.active:,} active for a token"
        return f"{self.total:,} parameters ({self.body:,} without embeddings{active})"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a causal LM, which may have no data (device `meta`)."""
    inner = unwrap_causal_lm(model)
    head = inner.get_output_embeddings()
    outside = {
        weight for module in inner.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()
    }
    outside |= set() if head is None else set(head.parameters())
    weights = set(inner.parameters())
    total = sum(weight.numel() for weight in weights)
    idle = _idle_share(inner)
    return ParameterCounts(
        total,
        total - sum(weight.numel() for weight in outside & weights),
        None if idle is None else total - idle,
    )


def _idle_share(model: PreTrainedModel) -> int | None:
    """Return the number of parameters of experts that one token is not sent to; None if there are no experts."""
    text = model.config.get_text_config()
    chosen = next((k for name in EXPERTS_PER_TOKEN if isinstance(k := getattr(text, name, None), int)), None)
    idle, found = 0, False
    for module in model.modules():
        if "Experts" in type(module).__name__ and chosen is not None:
            # transformers 5 keeps the experts of a layer as one parameter [experts, ...], biases as [experts, width].
            for weight in module.parameters(recurse=False):
                found = True
                idle += weight.numel() // len(weight) * max(0, len(weight) - chosen)
    return idle if found else None


def count_from_config(config: PreTrainedConfig) -> ParameterCounts | None:
    """Count the parameters of the model that a config describes, without memory for them; None for code of its own.

    Raises:
        ConfigError: no such model can be built.
    """
    if causal_lm_class(config) is None:
        return None
    try:
        with quietly():
            return count_parameters(build_on_meta(config))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"config_name: no {config.model_type} of this shape can be built ({reason}); change it by config_overrides."
        ) from None
