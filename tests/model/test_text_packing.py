"""From a config alone it is known whether texts can be packed: what the model itself would tell, and no number is drawn."""

from typing import Any

import pytest
import torch
from support import SIZES
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForSequenceClassification

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import PACKED_ATTENTION, packed_attention
from accel_llm.model.classifier import attach_scores
from accel_llm.model.text_packing import _small_config, config_packing_obstacle, fit_packing
from accel_llm.model.text_probe import text_packing_obstacle

LARGE = {"hidden_size": 256, "num_hidden_layers": 24, "num_attention_heads": 4, "intermediate_size": 1024}
# Published sizes, where special tokens have large numbers and layers are of two kinds; and decoders.
REAL: dict[str, dict[str, Any]] = {
    "bert": LARGE,
    "xlm-roberta": LARGE
    | {"vocab_size": 250_002, "max_position_embeddings": 514, "pad_token_id": 1, "eos_token_id": 2},
    "distilbert": {},
    "modernbert": {},
    "llama": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28_672},
    "gemma2": {},
}


PACKED: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "eurobert": {"classifier_pooling": "late"},
}
PADDED: dict[str, dict[str, Any]] = {"deberta-v2": {"relative_attention": True}, "mpnet": {}, "megatron-bert": {}}
READS_PADDING: dict[str, dict[str, Any]] = {"convbert": {"embedding_size": 16}, "fnet": {}}


@pytest.mark.parametrize("name", [*PACKED, *PADDED, *READS_PADDING])
def test_the_config_tells_what_the_whole_model_tells(name):
    own = (PACKED | PADDED | READS_PADDING)[name]
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = CONFIG_MAPPING[name](**SIZES | tokens | {"num_hidden_layers": 3, "type_vocab_size": 2} | own)
    model = AutoModelForSequenceClassification.from_config(config)
    attach_scores(model)
    expected = text_packing_obstacle(model, "cpu", torch.float32)
    assert config_packing_obstacle(config) == expected and (expected is None) == (name in PACKED)


def without_boundaries(module, query, key, value, mask, **options):
    whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    options |= {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole, "max_length_q": query.shape[2]}
    return packed_attention(module, query, key, value, mask, **options)


@pytest.mark.parametrize("name", REAL)
def test_models_of_any_size_can_be_packed(name):
    config = CONFIG_MAPPING[name](**REAL[name])
    before = config.to_dict()
    state = torch.get_rng_state()
    assert config_packing_obstacle(config) is None
    assert torch.equal(torch.get_rng_state(), state) and config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deberta-v2", "computes attention outside transformers' AttentionInterface"),
        ("mpnet", "computes attention outside transformers' AttentionInterface"),
        ("bart", "no module of BartForSequenceClassification returns the last states of the tokens"),
        (
            "mobilebert",
            "the scores of texts in a packed row of MobileBertForSequenceClassification and alone differ by",
        ),
        ("qwen3_5_text", "has layers of kind linear_attention, which mix neighboring documents"),
    ],
)
def test_what_cannot_be_packed_has_a_reason(name, reason):
    state = torch.get_rng_state()
    found = config_packing_obstacle(CONFIG_MAPPING[name]())
    assert reason in str(found) and found == config_packing_obstacle(CONFIG_MAPPING[name]())
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_over_the_whole_row_is_noticed(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, without_boundaries)
    assert "one text changes the scores of the others" in str(config_packing_obstacle(CONFIG_MAPPING["bert"](**LARGE)))


def test_the_twin_keeps_both_kinds_of_layers_and_all_special_tokens():
    config = CONFIG_MAPPING["modernbert"]()
    small = _small_config(config)
    assert small.num_hidden_layers == 2 and set(small.layer_types) == set(config.layer_types)
    names = ("pad", "bos", "eos", "cls", "sep")
    tokens, own = ([getattr(each, f"{name}_token_id") for name in names] for each in (config, small))
    assert min(tokens) > 50_000 and max(own) < small.vocab_size and len(set(own)) == len(set(tokens))
    assert [a < b for a in tokens for b in tokens] == [a < b for a in own for b in own]
    size = sum(each.numel() for each in AutoModelForSequenceClassification.from_config(small).parameters())
    assert size < 10_000_000


def options(**values: Any) -> ClassifyOptions:
    return ClassifyOptions(train_files=["a.jsonl"], **values)


MPNET, BERT = CONFIG_MAPPING["mpnet"](), CONFIG_MAPPING["bert"](hidden_size=32, num_attention_heads=4)


@pytest.mark.parametrize(
    ("values", "expected"),  # packing, order, rows in a forward pass of training and of evaluation
    [
        ({}, (None, "group_by_length", 16, 16)),
        ({"order": "length"}, (None, "length", 16, 16)),
        ({"per_device_train_batch_size": 4}, (None, "group_by_length", 4, 4)),
        ({"per_device_eval_batch_size": 4}, (None, "group_by_length", 16, 4)),
        ({"total_batch_size": 32}, (None, "group_by_length", 1, 1)),
        ({"gradient_accumulation_steps": 2}, (None, "group_by_length", 1, 1)),
    ],
)
def test_a_family_that_cannot_be_packed_is_padded(values, expected):
    given = options(**values)
    fitted, sentence = fit_packing(given, MPNET)
    sizes = fitted.per_device_train_batch_size, fitted.per_device_eval_batch_size
    assert (fitted.packing, fitted.order, *sizes) == expected
    assert fitted.model_fields_set == given.model_fields_set and not fitted.problems()
    assert sentence is not None and sentence.startswith("texts are padded, and not packed, because MPNetForSequence")
    assert ("per_device_train_batch_size: 16" in sentence) == (expected[2] == 16)
    assert ("order: group_by_length" in sentence) == ("order" not in values)


def test_nothing_changes_where_packing_works_or_is_off():
    for given, config in ((options(), BERT), (options(packing=True), BERT), (options(packing=False), MPNET)):
        assert fit_packing(given, config) == (given, None)


@pytest.mark.parametrize("value", [True, "static"])
def test_packing_that_the_user_asks_for_is_an_error(value):
    with pytest.raises(ConfigError, match=r"packing: .* does not work with this model: MPNet.*; set packing: false"):
        fit_packing(options(packing=value), MPNET)
