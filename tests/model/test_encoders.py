"""Scores of texts: what plain transformers gives for each text alone, packed and padded, and their gradients."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from support import SIZES, relative_distance
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from accel_llm.data.batches import join_documents, stack_documents
from accel_llm.errors import ConfigError
from accel_llm.model import encoders
from accel_llm.model.attention import PACKED_ATTENTION, enable_packing, enable_padding, packed_attention
from accel_llm.model.classifier import attach_scores
from accel_llm.model.encoders import classifier_config, encoder_parts, head_names, text_scores
from accel_llm.model.recomputation import recompute_activations
from accel_llm.model.text_probe import check_text_scores, text_packing_obstacle

ADAPTER = Path("/work/shared/data/adapters/peft0.17_distilbert_seqcls_modules_to_save_Tashu014")
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
# Families by name, with the options beside SIZES. A name may have a variant behind a colon.
PACKED: dict[str, dict] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "data2vec-text": {},
    "modernbert": MODERN,
    "modernbert:mean": MODERN | {"classifier_pooling": "mean"},
    "eurobert:late": {"classifier_pooling": "late"},
    "eurobert:mean": {"classifier_pooling": "mean"},
}
PADDED: dict[str, dict] = {
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED | {"position_biased_input": False, "position_buckets": 8, "share_att_key": True},
    "mpnet": {},
    "rembert": {"input_embedding_size": 16},
    "megatron-bert": {},
}
READS_PADDING: dict[str, dict] = {"convbert": {"embedding_size": 16}, "fnet": {}}
DECODERS: dict[str, dict] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma": {"head_dim": 8},
    "gpt2": GPT,
}
LENGTHS = (7, 1, 20, 3, 13, 2, 30)  # more tokens than the tables have positions


def built(name: str, dropout: float = 0.0, **options) -> Any:
    """A model with three classes, whose values make scores differ from text to text."""
    torch.manual_seed(0)
    family = name.split(":")[0]
    own = (PACKED | PADDED | READS_PADDING | DECODERS)[name]
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob")
    rates += ("dropout", "attention_dropout", "seq_classif_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    settings: dict[str, Any] = SIZES | TOKENS | {"type_vocab_size": 2} | dict.fromkeys(rates, dropout) | own | options
    config = classifier_config(
        CONFIG_MAPPING[family](**settings), ("single_label_classification", ["bad", "good", "none"])
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else parameter + 0.1)
    return model.eval()


def texts(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, segments) of each text; ids 3 to 96 are plain tokens."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, 97, n), (np.arange(n) >= (n + 1) // 2).astype(np.int64)) for n in LENGTHS]


def batch_of(rows: list[tuple[np.ndarray, np.ndarray]], packed: bool) -> dict:
    documents, lengths = [ids for ids, _ in rows], np.array([len(ids) for ids, _ in rows])
    batch = join_documents(documents) if packed else stack_documents(documents, 1)
    width = batch["input_ids"].shape[1]
    starts = lengths.cumsum() - lengths if packed else np.arange(len(rows)) * width
    segments = np.zeros(batch["input_ids"].numel(), np.int64)
    for start, (_, own) in zip(starts, rows, strict=True):
        segments[start : start + len(own)] = own
    return batch | {
        "first_positions": torch.from_numpy(starts),
        "last_positions": torch.from_numpy(starts + lengths - 1),
        "token_type_ids": torch.from_numpy(segments).view_as(batch["input_ids"]),
    }


def plain_scores(model: Any, rows: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """What plain transformers gives for each text alone, without a mask, by eager attention."""
    segments = encoders.takes_segments(model) and getattr(model.config, "type_vocab_size", 0)
    scores = []
    for ids, types in rows:
        inputs = {"input_ids": torch.from_numpy(ids)[None]}
        if segments:
            inputs["token_type_ids"] = torch.from_numpy(types)[None]
        scores.append(model(**inputs).logits)
    return torch.cat(scores)


def ours(plain: Any, packed: bool) -> Any:
    model = deepcopy(plain)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if packed:
        enable_packing(model)
    attach_scores(model)
    return model


@pytest.mark.parametrize(
    ("name", "packed"),
    [(name, True) for name in [*PACKED, *DECODERS]]
    + [
        (name, False) for name in ("bert", "roberta", "distilbert", "modernbert:mean", "eurobert:late", "llama", "gpt2")
    ],
)
def test_scores_are_those_of_plain_transformers(name, packed):
    plain, rows = built(name), texts()
    model = ours(plain, packed)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        expected = plain_scores(plain, rows)
        scores = text_scores(model, batch_of(rows, packed))
    assert scores.dtype == torch.float32 and scores.shape == (len(rows), 3)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).min() > 1e-2  # the texts have scores of their own
    if packed:
        assert text_packing_obstacle(model, "cpu", torch.float32) is None
    else:
        check_text_scores(model, "cpu", torch.float32)


@pytest.mark.parametrize("name", PADDED)
def test_families_with_attention_of_their_own_are_padded(name):
    plain, rows = built(name), texts()
    model = ours(plain, packed=False)
    assert "attention outside transformers' AttentionInterface" in str(
        text_packing_obstacle(model, "cpu", torch.float32)
    )
    check_text_scores(model, "cpu", torch.float32)
    with torch.no_grad():
        scores, expected = text_scores(model, batch_of(rows, packed=False)), plain_scores(plain, rows)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READS_PADDING)
def test_a_family_that_reads_the_padding_is_refused(name):
    """A convolution of ConvBERT and the Fourier transform of FNet take in the padding, in plain transformers too."""
    model = ours(built(name), packed=False)
    with pytest.raises(ConfigError, match=r"one text changes|alone differ by .*set per_device_train_batch_size: 1"):
        check_text_scores(model, "cpu", torch.float32)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "albert", "modernbert:mean", "eurobert:late", "gpt2"]
)
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_those_of_each_text_alone(name, packed):
    plain, rows = built(name).double(), texts()
    model = ours(plain, packed).train()
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(len(rows), 3)))
    plain.set_attn_implementation("sdpa")  # ModernBERT's own eager attention has a softmax in float32
    (plain_scores(plain, rows) * weights).sum().backward()
    (text_scores(model, batch_of(rows, packed)) * weights).sum().backward()
    grads = dict(model.named_parameters())
    for parameter, expected in plain.named_parameters():
        assert expected.grad is not None, parameter
        torch.testing.assert_close(grads[parameter].grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert:mean", "llama"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_changed_text_moves_no_bit_of_another(name, packed):
    model, rows = ours(built(name), packed), texts()
    changed = list(rows)
    changed[2] = ((rows[2][0] - 2) % 94 + 3, rows[2][1])
    with torch.no_grad():
        before, after = (text_scores(model, batch_of(each, packed)) for each in (rows, changed))
    others = [k for k in range(len(rows)) if k != 2]
    assert torch.equal(before[others], after[others])
    assert relative_distance(after[2], before[2]) > 1e-2


def without_boundaries(module, query, key, value, mask, **options):
    whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    options |= {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole, "max_length_q": query.shape[2]}
    return packed_attention(module, query, key, value, mask, **options)


def causal(module, query, key, value, mask, **options):
    return packed_attention(module, query, key, value, mask, **options | {"is_causal": True})


@pytest.mark.parametrize("fault", ["no boundaries", "causal", "positions go on", "first place", "mask of the mean"])
def test_a_fault_is_found(fault, monkeypatch):
    name = "modernbert:mean" if fault == "mask of the mean" else "roberta"
    model = ours(built(name), packed=True)
    check_text_scores(model, "cpu", torch.float32)
    if fault in ("no boundaries", "causal"):
        attention = without_boundaries if fault == "no boundaries" else causal
        monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, attention)
    elif fault == "positions go on":
        monkeypatch.setattr(encoders, "_positions", lambda _, ids, __: torch.arange(ids.shape[1])[None] % 60 + 2)
    elif fault == "first place":
        monkeypatch.setattr(encoders, "_positions", lambda _, __, positions: positions)  # from 0, as those of BERT
    else:
        monkeypatch.setattr(torch, "minimum", lambda places, last: places.clamp(max=0))
    with pytest.raises(ConfigError, match=r"model_name_or_path: .*set packing: false"):
        check_text_scores(model, "cpu", torch.float32)
    assert "of the others by" in str(text_packing_obstacle(model, "cpu", torch.float32)) or fault != "no boundaries"


def test_padding_is_masked_and_without_the_mask_the_scores_are_others():
    model, rows = ours(built("bert"), packed=False), texts()
    enable_padding(model)  # leaves out the masks of causal attention only
    batch = batch_of(rows, packed=False)
    with torch.no_grad():
        expected, scores = plain_scores(built("bert"), rows), text_scores(model, batch)
        unmasked = text_scores(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert relative_distance(unmasked, expected) > 1e-2


@pytest.mark.parametrize("packed", [True, False])
def test_a_pad_token_inside_a_text_has_the_position_that_roberta_gives_it(packed):
    plain, rows = built("roberta"), texts()
    for k, place in ((0, 3), (2, 0), (4, 12)):
        rows[k][0][place] = 1
    with torch.no_grad():
        scores = text_scores(ours(plain, packed), batch_of(rows, packed))
        torch.testing.assert_close(scores, plain_scores(plain, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["roberta", "modernbert:mean"])
def test_the_text_of_an_empty_slot_has_scores_that_can_count_nothing(name, packed):
    model = ours(built(name), packed).train()
    scores = text_scores(model, batch_of([(np.full(2, 1), np.zeros(2, np.int64))], packed))
    (scores * 0).sum().backward()
    assert scores.shape == (1, 3) and scores.isfinite().all()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_segments_count_where_the_model_has_them():
    rows = texts()
    first_only = [(ids, np.zeros_like(types)) for ids, types in rows]
    for name, read in (("bert", True), ("distilbert", False)):
        model = ours(built(name), packed=True)
        with torch.no_grad():
            two, one = (text_scores(model, batch_of(each, packed=True)) for each in (rows, first_only))
        assert (relative_distance(two, one) > 1e-3) == read


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "distilbert"])
def test_the_dropout_of_the_head_acts_in_training_only(name):
    model, batch = ours(built(name), packed=True), batch_of(texts(), packed=True)
    dropouts = [m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and model.base_model_prefix not in n]
    for module in dropouts:
        module.p = 0.5
    with torch.no_grad():
        quiet = [text_scores(model.eval(), batch) for _ in range(2)]
        noisy = [text_scores(model.train(), batch) for _ in range(2)]
    assert dropouts and torch.equal(*quiet)
    assert relative_distance(noisy[0], noisy[1]) > 1e-2 and relative_distance(noisy[0], quiet[0]) > 1e-2


@pytest.mark.parametrize("name", ["bert", "modernbert:mean"])
def test_recomputed_activations_give_the_same_gradient(name):
    gradients = []
    for recompute in (False, True):
        model = ours(built(name), packed=True).train()
        if recompute:
            recompute_activations(model)
        text_scores(model, batch_of(texts(), packed=True)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_the_head_computes_in_float32_under_autocast():
    model, batch = ours(built("bert"), packed=True), batch_of(texts(), packed=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = text_scores(model, batch)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "albert": ["albert.pooler", "classifier"],
    "electra": ["classifier"],
    "modernbert": ["head", "classifier"],
    "eurobert:mean": ["dense", "classifier"],
    "deberta": ["pooler", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "mpnet": ["classifier"],
    "llama": ["score"],
    "gpt2": ["score"],
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_comes_after_the_layers(name):
    model = built(name)
    state = torch.get_rng_state()
    assert head_names(model) == HEADS[name]
    assert torch.equal(state, torch.get_rng_state())
    # PEFT 0.21 takes every module whose name ends like this: it must find the head, and nothing in the layers.
    found = {n for n, _ in model.named_modules() if n.endswith(tuple(HEADS[name]))}
    assert found == set(HEADS[name])
    # All of the head has a gradient, and so has every layer before it.
    attach_scores(model)
    text_scores(model, batch_of(texts(), packed=False)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n in HEADS[name] for p in model.get_submodule(n).parameters())


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_an_adapter_with_its_head_gives_the_scores_of_plain_transformers(name):
    plain, rows = built(name), texts()
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=head_names(plain), init_lora_weights=False
    )
    model: Any = get_peft_model(ours(plain, packed=True), config).train()
    assert head_names(model) == HEADS[name]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for head in HEADS[name]:
        assert any(f".{head}.modules_to_save" in n for n in trained)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.add_(0.1)
        scores = text_scores(model, batch_of(rows, packed=True))
        reference: Any = get_peft_model(deepcopy(plain), deepcopy(config))
        reference.load_state_dict(model.state_dict())
        expected = plain_scores(reference.base_model.model, rows)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(
                text_scores(model, batch_of(rows, packed=True)), plain_scores(plain, rows), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("saved", ["head_names", "SEQ_CLS alone"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_the_new_pooler_of_a_masked_language_model_is_saved_with_the_adapter(saved, tmp_path):
    """Its files have none, so each load draws another one; PEFT 0.21's SEQ_CLS saves `classifier` only."""
    settings = built("bert").config
    AutoModelForMaskedLM.from_config(settings).save_pretrained(tmp_path / "base")

    def load(seed: int) -> Any:
        torch.manual_seed(seed)
        own = {"num_labels": 3, "output_loading_info": True}
        model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **own)
        missing = {name.rsplit(".", 1)[0].removesuffix(".dense") for name in report["missing_keys"]}
        assert missing == set(head_names(model))
        return model.eval()

    base, rows = load(0), texts()
    names = head_names(base) if saved == "head_names" else None
    model: Any = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", modules_to_save=names)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(load(1), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        before, after = (plain_scores(each.base_model.model, rows) for each in (model, again))
    assert torch.equal(before, after) == (saved == "head_names")


@pytest.mark.skipif(not ADAPTER.is_dir(), reason="the published adapter is not here")
def test_the_head_of_a_published_adapter_is_the_one_that_is_found():
    assert json.loads((ADAPTER / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    with safe_open(ADAPTER / "adapter_model.safetensors", "pt") as file:
        saved = {n.removeprefix("base_model.model.").rsplit(".", 1)[0] for n in file.keys() if "lora" not in n}  # noqa: SIM118
    assert saved == set(head_names(built("distilbert")))


def test_the_config_of_a_classifier_survives_a_reload(tmp_path):
    names = ["negativ", "positiv", "gemischt"]
    sizes: dict[str, Any] = SIZES | TOKENS
    before = CONFIG_MAPPING["roberta"](**sizes)
    config = classifier_config(before, ("multi_label_classification", names))
    assert before.num_labels == 2 and before.problem_type is None
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.num_labels, loaded.problem_type) == (3, "multi_label_classification")
    assert loaded.id2label == dict(enumerate(names)) and loaded.label2id == {n: k for k, n in enumerate(names)}
    assert loaded.architectures == ["RobertaForSequenceClassification"]
    assert classifier_config(before, ("regression", ["score"])).num_labels == 1


def test_the_forward_without_targets_stays_the_familys_own():
    plain, rows = built("bert"), texts()
    model = ours(plain, packed=False)
    assert torch.equal(plain_scores(model, rows), plain_scores(plain, rows))
    assert encoder_parts(plain).states == "bert.encoder"


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert", "modernbert", "modernbert:mean"])
def test_whether_a_head_reads_the_first_token_only_is_seen_in_its_gradient(name):
    assert encoder_parts(built(name)).first_only == (name != "modernbert:mean")
