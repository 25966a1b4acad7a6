"""Parameters are counted as plain transformers counts them, and as the models' own papers and cards do."""

import pytest
from support import FAMILIES, UNPACKABLE, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING

from accel_llm.errors import ConfigError
from accel_llm.model.parameter_counts import count_from_config, count_parameters

# Sizes in their config.json, and what was published, in billions: all, without embeddings, active. The cards of
# Qwen2.5 and Qwen3, the papers of GPT-2, Mixtral and DeepSeek-V3; a dash: not published.
PUBLISHED = {
    "Qwen2.5-1.5B": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
         "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        ("1.54", "1.31", None),
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4},
        ("7.62", "6.53", None),
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8},
        ("30.5", "29.9", "3.4"),  # the card says 3.3
    ),
    "Mixtral-8x7B": ("mixtral", {}, ("46.7", None, "12.9")),
    "DeepSeek-V3": ("deepseek_v3", {}, ("671", None, "38")),  # the paper says 37
    "GPT-2": ("gpt2", {}, ("0.124", None, None)),
}  # fmt: skip


def rounded(count: int | None, published: str | None) -> str | None:
    """`count` in billions with as many digits as were published."""
    if count is None or published is None:
        return None
    return f"{count / 1e9:.{len(published.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_are_the_published_ones(name):
    family, sizes, published = PUBLISHED[name]
    counts = count_from_config(CONFIG_MAPPING[family](**sizes))
    assert counts
    found = (counts.total, counts.body, counts.active)
    assert tuple(map(rounded, found, published)) == published
    assert (counts.active is None) == (published[2] is None)


@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_the_counts_are_those_of_plain_transformers(family):
    model = tiny_model(family)
    counts = count_parameters(model)
    assert counts.total == model.num_parameters()
    # Its own `exclude_embeddings` leaves out embeddings alone, and tied output projections with them.
    own = model.num_parameters(exclude_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    untied = head is not None and head.weight is not embedding.weight
    bias = 0 if head is None or head.bias is None else head.bias.numel()
    assert counts.body == own - (head.weight.numel() if untied else 0) - bias
    # A token goes through `chosen` of the experts of each layer.
    chosen, idle = getattr(model.config, "num_experts_per_tok", None), 0
    for module in model.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module):
            idle += sum(p[0].numel() * (len(p) - chosen) for p in experts.parameters())
    assert counts.active == (counts.total - idle if idle else None)


def test_a_shape_that_cannot_be_built_is_an_error():
    config = CONFIG_MAPPING["llama"](intermediate_size=-3)
    with pytest.raises(ConfigError, match=r"^config_name: no llama of this shape can be built \("):
        count_from_config(config)
