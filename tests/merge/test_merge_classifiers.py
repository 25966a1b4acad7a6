"""Merged classifiers give the logits of plain PEFT on plain transformers, and load with every weight and every label."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import GPT, SIZES
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge import compare_logits
from accel_llm.merge.merge import merge, merge_adapter
from accel_llm.model.encoders import classifier_config, head_names

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHARED = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = SHARED / "adapters" / "peft0.17_distilbert_seqcls_modules_to_save_Tashu014"
TOKENS = {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2}
# Options of each family, and the layers that a LoRA is often put on.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": ({"type_vocab_size": 2}, ["query", "value"]),
    "distilbert": ({"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, ["q_lin", "v_lin"]),
    "roberta": ({"type_vocab_size": 1, **TOKENS}, ["query", "value"]),
    "modernbert": (TOKENS, ["Wqkv"]),
    "deberta-v2": (
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        ["query_proj", "value_proj"],
    ),
    "llama": ({}, ["q_proj", "v_proj"]),
    "gpt2": (GPT, ["c_attn"]),
}
NAMES = ["bad", "good", "none"]


def build(family: str, labels: tuple[str, list[str]] = ("single_label_classification", NAMES)) -> Any:
    """A classifier with values so large that each layer changes the logits."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family][0]})
    model = AutoModelForSequenceClassification.from_config(classifier_config(config, labels))
    return enlarge(model).eval()


def enlarge(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def adapt(model: Any, folder: Path, base: Path, modules: list[str] | None = None, **settings: Any) -> Any:
    """Save an adapter as PEFT does, with values that training might leave: no factor is 0, and the head has changed.

    PEFT 0.21 saves the modules whose names end with one of `modules`.
    """
    names = head_names(model) if modules is None else modules
    config = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, modules_to_save=names, **settings)
    model.name_or_path = str(base)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def some_ids() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (1, n), generator=generator) for n in (30, 7, 2)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits for ids in some_ids()])


def load_merged(folder: Path) -> Any:
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def save_labels(model: Any, folder: Path) -> None:
    """Write config.json beside an adapter, as launch/classify.py exports it."""
    model.config.save_pretrained(folder)


@pytest.mark.parametrize("layers", ["often", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_classifier_has_the_logits_of_peft(family, layers, tmp_path):
    """The base is a language model or an encoder without a head; the adapter brings the head, and config.json its names."""
    model = build(family)
    model.base_model.save_pretrained(tmp_path / "base")
    targets = FAMILIES[family][1] if layers == "often" else layers
    wrapped = adapt(model, tmp_path / "adapter", tmp_path / "base", target_modules=targets)
    save_labels(model, tmp_path / "adapter")
    expected = logits(wrapped)
    with wrapped.disable_adapter():
        assert (logits(wrapped) - expected).abs().max() > 0.1  # what is merged counts

    options = MergeOptions(adapter=[str(tmp_path / "adapter")], output_dir=str(tmp_path / "merged"))
    assert merge(options).modules > 1
    merged = load_merged(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert merged.config.id2label == dict(enumerate(NAMES)) and merged.config.label2id["none"] == 2
    assert merged.config.problem_type == "single_label_classification"
    assert merged.config.architectures == [type(merged).__name__]
    # What --verify logits computes in a process of its own.
    differences = compare_logits._compare(tmp_path / "merged", tmp_path / "base", [tmp_path / "adapter"], options)
    assert differences["merged"] < 1e-5


@pytest.mark.long
def test_logits_are_compared_on_all_positions_and_a_difference_is_found(tmp_path):
    """RoBERTa's table has two rows that are no positions; a head of other values is a difference."""
    model = build("roberta")
    model.base_model.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "adapter", tmp_path / "base", target_modules=["query"])
    save_labels(model, tmp_path / "adapter")
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify="logits")
    assert result.differences["merged"] < 1e-4
    ids = compare_logits._sample_ids(tmp_path / "merged", load_merged(tmp_path / "merged"), False)
    assert ids.shape == (1, SIZES["max_position_embeddings"] - 2) and len(ids.unique()) > 30

    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["classifier.dense.bias"] += 0.1
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    options = MergeOptions(adapter=[str(tmp_path / "adapter")], output_dir="x")
    with pytest.raises(ConfigError, match="verify: the merged model's logits differ from the adapter's by"):
        compare_logits._compare(tmp_path / "merged", tmp_path / "base", [tmp_path / "adapter"], options)


def test_labels_are_those_of_the_folder_or_of_the_base_or_are_counted(tmp_path):
    """An adapter of plain PEFT has no config.json: its head has as many rows as there are labels."""
    for family, labels in (("distilbert", 5), ("modernbert", 1), ("bert", 2), ("roberta", 4), ("llama", 3)):
        folder = tmp_path / family
        names = [f"LABEL_{k}" for k in range(labels)]
        model = build(family, ("regression" if labels == 1 else "single_label_classification", names))
        model.base_model.save_pretrained(folder / "base")
        adapt(model, folder / "adapter", folder / "base", target_modules=FAMILIES[family][1])
        merge_adapter(folder / "adapter", folder / "merged")
        config = load_merged(folder / "merged").config
        assert config.id2label == dict(enumerate(names)), family
        assert config.problem_type == ("regression" if labels == 1 else "single_label_classification")

    model = build("bert", ("multi_label_classification", NAMES))
    model.save_pretrained(tmp_path / "named")
    adapt(model, tmp_path / "adapter", tmp_path / "named", target_modules=["query"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    config = load_merged(tmp_path / "merged").config
    assert (config.problem_type, config.id2label) == ("multi_label_classification", dict(enumerate(NAMES)))

    # Of two classes with the names of transformers, config.json holds no names.
    two = build("bert", ("multi_label_classification", ["LABEL_0", "LABEL_1"]))
    two.base_model.save_pretrained(tmp_path / "two")
    adapt(two, tmp_path / "of_two", tmp_path / "two", target_modules=["query"])
    save_labels(two, tmp_path / "of_two")
    assert "id2label" not in json.loads((tmp_path / "of_two" / "config.json").read_text(encoding="utf-8"))
    merge_adapter(tmp_path / "of_two", tmp_path / "merged_two")
    config = load_merged(tmp_path / "merged_two").config
    assert (config.problem_type, config.num_labels) == ("multi_label_classification", 2)


def test_an_adapter_is_taken_out_of_a_classifier(tmp_path):
    """Without modules_to_save nothing of the base is lost."""
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type=None, init_lora_weights=False, target_modules=["query", "dense"])
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", tmp_path / "again", base=str(tmp_path / "merged"), unmerge=True)
    expected, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(again[name], weight, atol=1e-5) for name, weight in expected.items())
    assert not all(torch.allclose(merged[name], weight, atol=1e-5) for name, weight in expected.items())
    assert load_merged(tmp_path / "again").config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize(
    ("family", "saved", "lost"),
    [
        ("bert", ["classifier"], "bert.pooler.dense.bias, bert.pooler.dense.weight"),
        ("modernbert", ["classifier"], "head.dense.weight, head.norm.weight"),
    ],
)
def test_a_head_that_is_in_no_file_is_refused(family, saved, lost, tmp_path):
    """PEFT 0.21 saves `classifier` of SEQ_CLS and no more; what comes before it is random in a base of plain texts."""
    model = build(family)
    encoder = AutoModel.from_config(model.config, **({"add_pooling_layer": False} if family == "bert" else {}))
    encoder.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "adapter", tmp_path / "base", modules=saved, target_modules=FAMILIES[family][1])
    with pytest.raises(ConfigError) as error:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert str(error.value) == (
        f"base: neither {tmp_path / 'base'} nor the adapter {tmp_path / 'adapter'} has the weights {lost}, so predictions "
        "would be random; name the classifier that the adapter was trained on with --base, or train the adapter again "
        "with these modules in modules_to_save."
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the data is not here")
@pytest.mark.long
def test_a_published_adapter_is_merged_as_peft_loads_it(tmp_path):
    """PEFT 0.17, saved by another program, without config.json: its file holds both layers of the head."""
    torch.manual_seed(0)
    base = enlarge_a_little(DistilBertForSequenceClassification(DistilBertConfig())).eval()
    base.save_pretrained(tmp_path / "base")
    base.distilbert.save_pretrained(tmp_path / "headless")
    expected = PeftModel.from_pretrained(base, str(PUBLISHED)).eval()
    for name in ("base", "headless"):
        merge_adapter(PUBLISHED, tmp_path / f"merged_{name}", base=str(tmp_path / name))
        merged = load_merged(tmp_path / f"merged_{name}")
        assert (logits(merged) - logits(expected)).abs().max() < 1e-5
        assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with expected.disable_adapter():
        assert (logits(merged) - logits(expected)).abs().max() > 1e-3

    # The same adapter, as a program saves it that takes `classifier` for the whole head.
    half = half_of_the_head(tmp_path / "half")
    with pytest.raises(
        ConfigError, match=r"has the weights pre_classifier.bias, pre_classifier.weight, so predictions"
    ):
        merge_adapter(half, tmp_path / "other", base=str(tmp_path / "headless"))
    with pytest.raises(
        ConfigError, match=r"does not fit its base \(it lacks 'base_model.model.pre_classifier.weight'\)"
    ):
        merge_adapter(half, tmp_path / "other", base=str(tmp_path / "base"))  # PEFT looks for it by its last part


def half_of_the_head(folder: Path) -> Path:
    """Copy the published adapter without the first layer of its head."""
    shutil.copytree(PUBLISHED, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    weights = load_file(PUBLISHED / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".pre_classifier." not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def enlarge_a_little(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model
