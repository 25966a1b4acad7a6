"""A fresh model begins as transformers lets its family begin, bit for bit the same however it is put together."""

import itertools

import pytest
import torch
from support import FAMILIES, SIZES, UNFUSED_FAMILIES, UNPACKABLE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from accel_llm.model.first_weights import FirstWeights
from accel_llm.model.meta_device import build_on_meta

ALL = {**FAMILIES, **UNPACKABLE, **UNFUSED_FAMILIES, "jetmoe": {}}
WIDE = {"vocab_size": 211, "pad_token_id": 3}  # more numbers to compare; the row of padding is not the first one


def config_of(family: str, **more) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**{**SIZES, **ALL[family], **WIDE, **more})


def fresh(family: str, seed: int = 1, **more) -> PreTrainedModel:
    """A model of ours, drawn in one piece."""
    model = build_on_meta(config_of(family, **more), tie=False)
    FirstWeights(model, seed).draw(model.modules())
    return model


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance between the two empirical distribution functions, times sqrt(n / 2): Kolmogorov's statistic.

    For samples of one distribution it is above 2.2 once in 10,000 times.
    """
    a, b = a.flatten().double(), b.flatten().double()
    both = torch.cat([a, b]).unique()
    below = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (a, b)]
    return float((below[0] - below[1]).abs().max()) * (len(a) / 2) ** 0.5


@pytest.mark.parametrize("family", ALL)
def test_the_distribution_is_that_of_transformers(family):
    ours = tensors(fresh(family))
    torch.manual_seed(5)
    other = tensors(AutoModelForCausalLM.from_config(config_of(family)))
    torch.manual_seed(6)
    third = tensors(AutoModelForCausalLM.from_config(config_of(family)))
    assert ours.keys() == other.keys()
    for name, expected in other.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype
        if torch.equal(expected, third[name]):  # a constant
            assert torch.equal(ours[name], expected), name
        else:
            assert ours[name].is_floating_point() and not torch.equal(ours[name], expected)
            # Rows and columns that are constant, such as that of padding, are so here too.
            constant = expected == third[name]
            assert torch.equal(ours[name][constant], expected[constant]) or constant.sum() < 3, name
            assert difference(ours[name][~constant], expected[~constant]) < 2.2, name


def test_a_wrong_distribution_would_be_noticed():
    names = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
    ours, other = tensors(fresh("llama")), tensors(fresh("llama", initializer_range=0.03))
    assert all(difference(ours[name], other[name]) > 2.2 for name in names)


def test_layers_differ_and_so_do_seeds():
    ours = tensors(fresh("llama"))
    matrices = [weight for weight in ours.values() if weight.ndim == 2]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(matrices, 2) if a.shape == b.shape)
    other = tensors(fresh("llama", seed=2))
    assert all(not torch.equal(ours[name], other[name]) for name in ours if ours[name].ndim == 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "falcon_h1", "modernbert-decoder"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bits_do_not_depend_on_the_order_of_the_layers_or_on_what_was_drawn_before(family, tied):
    whole = tensors(fresh(family, tie_word_embeddings=tied))
    model = build_on_meta(config_of(family, tie_word_embeddings=tied), tie=False)
    first, count = FirstWeights(model, 1), len(list(model.parameters()))
    state = torch.get_rng_state()
    for module in reversed(list(model.modules())):
        first.draw([module])
    assert torch.equal(torch.get_rng_state(), state)  # whatever is drawn later does not depend on the size of the model
    parts = tensors(model)
    assert len(list(model.parameters())) == count and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied


def test_a_deeper_model_begins_with_the_same_layers():
    shallow, deep = tensors(fresh("llama")), tensors(fresh("llama", num_hidden_layers=4))
    assert all(torch.equal(deep[name], shallow[name]) for name in shallow)


def test_a_layer_that_is_drawn_leaves_the_others_alone():
    model = build_on_meta(config_of("falcon_h1"), tie=False)  # one call writes buffers of all layers
    first = FirstWeights(model, 1)
    first.draw(model.model.layers[0].modules())
    before = {name: tensor.clone() for name, tensor in tensors(model).items() if not tensor.is_meta}
    assert before and all(".layers.0." in f".{name}" for name in before)
    first.draw(model.modules())
    after = tensors(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(tensor.is_meta for tensor in after.values())


def test_the_values_are_those_of_the_familys_own_rules_for_the_same_seeds():
    """The oracle draws one matrix as a family's rule does, from the seed that the names give."""
    import hashlib

    model = fresh("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    digest = hashlib.sha256(f"1\n{name}".encode()).digest()
    layer = torch.nn.Linear(32, 32, bias=False)
    with torch.no_grad(), guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        model._init_weights(layer)
    assert torch.equal(dict(model.named_parameters())[name], layer.weight)
    assert abs(float(layer.weight.detach().std()) / model.config.initializer_range - 1) < 0.1
