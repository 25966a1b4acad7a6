"""Adapters saved by any release of PEFT or by other scripts are read, or refused in one sentence."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    OPTConfig,
)

from accel_llm.adapters.compat import SavedAdapter, build_peft_config, clean_settings, read_adapter
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import adapted_modules, check_mergeable, load_adapter
from accel_llm.merge.merge import merge

pytestmark = pytest.mark.usefixtures("quiet")
DATA = Path(__file__).parents[3] / "shared" / "data"
CONFIGS = sorted((DATA / "adapter_configs").glob("[0-9]*.json"))
real = pytest.mark.skipif(not CONFIGS, reason="shared/data is not there")
SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def refusal(call) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    return str(error.value)


def adapter(folder: Path, settings: dict, state: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if state is None:
        state = {f"base_model.model.q_proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


@real
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_published_config_is_read_and_left_as_it_is(path, tmp_path):
    before = path.read_bytes()
    settings = json.loads(before)
    cleaned, notes = clean_settings(settings, path)
    config = build_peft_config(cleaned, path)
    for key in ("r", "lora_alpha", "num_virtual_tokens", "task_type"):
        assert getattr(config, key, None) == settings.get(key)
    unknown = {"enable_lora", "merge_weights"} & settings.keys()
    ignored_keys = {key for key in unknown if not (key == "enable_lora" and settings[key])}
    assert [note.split(": ")[1].split(" ")[0] for note in notes] == sorted(ignored_keys, key=list(settings).index)
    assert all("a key of PEFT 0.2, unknown to PEFT" in note for note in notes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [None, True, {"use": "it"}])
def test_keys_of_releases_to_come_are_set_aside_by_name(tmp_path, value):
    folder = adapter(tmp_path / "a", SETTINGS | {"lora_from_tomorrow": value, "peft_version": "0.99.0"})
    assert read_adapter(folder).notes == (
        f"adapter_config.json: lora_from_tomorrow ({json.dumps(value)}) is a key of PEFT 0.99.0, unknown to PEFT "
        f"{peft.__version__}; it is ignored.",
    )
    folder = adapter(folder, SETTINGS | {"lora_from_tomorrow": value})
    assert "is a key of another release of PEFT" in read_adapter(folder).notes[0]


def test_odd_values_are_understood(tmp_path):
    odd = {
        "lora_dropout": 1,
        "fan_in_fan_out": None,
        "inference_mode": False,
        "loftq_config": {},
        "megatron_config": {},
    }
    config = read_adapter(adapter(tmp_path / "a", SETTINGS | odd)).config
    assert (config.lora_dropout, config.fan_in_fan_out, config.inference_mode) == (0.0, False, True)
    minimal = {"r": 4, "lora_alpha": 8, "target_modules": "q_proj"}
    assert read_adapter(adapter(tmp_path / "b", minimal)).config.peft_type == "LORA"
    note = read_adapter(adapter(tmp_path / "c", SETTINGS | {"megatron_config": {"world": 8}})).notes[0]
    assert note.startswith("megatron_config of ") and note.endswith("transformers' models have no Megatron layers.")


@pytest.mark.parametrize(
    "targets, adapted", [("q_proj", 2), (r".*\.1\..*q_proj", 1), ("all-linear", 14), (["q_proj", "v_proj"], 4)]
)
def test_a_text_is_a_pattern_or_the_end_of_a_name(tiny, tmp_path, targets, adapted):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    target_modules = ["q_proj"] if targets == "q_proj" else targets
    whole = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, init_lora_weights=False)
    )
    whole.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    wrapped = load_adapter(AutoModelForCausalLM.from_pretrained(tiny), read_adapter(tmp_path / "a"))
    assert len(adapted_modules(wrapped)) == adapted
    ids = torch.arange(20)[None]
    assert torch.equal(wrapped(ids).logits, whole.eval()(ids).logits)


@pytest.mark.parametrize(
    "old",
    [
        "base_model.model.q_proj.lora_A.default.weight",
        "module.base_model.model.q_proj.lora_A.weight",
        "base_model.model._fsdp_wrapped_module.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.q_proj.lora_A.weight",
        "q_proj.lora_A.weight",
    ],
)
def test_names_of_unwrapped_weights_are_mapped(tmp_path, old):
    folder = adapter(tmp_path / "a", SETTINGS, {old: torch.ones(4, 4)})
    assert list(read_adapter(folder).weights) == ["base_model.model.q_proj.lora_A.weight"]


def test_saved_modules_with_the_name_of_their_wrapper_are_mapped(tmp_path):
    state = {
        "base_model.model.q_proj.lora_A.weight": torch.ones(4, 4),
        "base_model.model.score.modules_to_save.default.weight": torch.ones(2, 4),
        "base_model.model.module_list.0.weight": torch.ones(1),
    }
    assert read_adapter(adapter(tmp_path / "a", SETTINGS, state)).weights.keys() == {
        "base_model.model.q_proj.lora_A.weight",
        "base_model.model.score.weight",
        "base_model.model.module_list.0.weight",
    }


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False]])
def test_enable_lora_of_fused_projections_computes_what_it_did(enabled, tmp_path):
    """PEFT 0.1 put LoRA on some parts of a fused projection by a grouped convolution over the ranks."""
    rank, width, count = 3, 8, sum(enabled)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rank * count, width, generator=generator)
    B = torch.randn(width * count, rank, 1, generator=generator)
    x = torch.randn(5, width, generator=generator)
    parts = F.conv1d((x @ A.T).T[None], B, groups=count)[0].T.chunk(count, dim=1)
    parts_left = iter(parts)
    expected = torch.cat([next(parts_left) if has else torch.zeros(5, width) for has in enabled], dim=1) * (8 / rank)

    name = "base_model.model.query_key_value.lora_"
    settings = SETTINGS | {
        "r": rank,
        "target_modules": ["query_key_value"],
        "enable_lora": enabled,
        "merge_weights": False,
    }
    folder = adapter(tmp_path / "a", settings, {f"{name}A.weight": A, f"{name}B.weight": B})
    read = read_adapter(folder)
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(width, 3 * width, bias=False),
        "default",
        read.config,
        r=read.config.r,
        lora_alpha=read.config.lora_alpha,
    )
    layer.base_layer.weight.data.zero_()
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = read.weights.values()
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_what_is_no_adapter_is_refused(tmp_path, tiny):
    folder = adapter(tmp_path / "a", SETTINGS, {"model.q_proj.weight": torch.ones(4, 4)})
    assert refusal(lambda: read_adapter(folder)) == (
        f"adapter: {folder} holds 1 weights, but none of an adapter (one is base_model.model.model.q_proj.weight); a "
        "folder with weights of a model, averaged or not, is not an adapter: give --adapter the folders of adapters, "
        "several to combine them."
    )
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(lambda: read_adapter(folder)) == (
        f"adapter: {folder} has no adapter_model.safetensors (it holds adapter_config.json)."
    )
    folder = adapter(tmp_path / "b", SETTINGS | {"peft_type": "LORAX"})
    assert f"is of peft_type 'LORAX', unknown to PEFT {peft.__version__}; known are " in refusal(
        lambda: read_adapter(folder)
    )
    folder = adapter(tmp_path / "b", SETTINGS | {"task_type": "POETRY"})
    assert "has task_type 'POETRY'; known are " in refusal(lambda: read_adapter(folder))
    folder = adapter(
        tmp_path / "b", SETTINGS | {"init_lora_weights": "magic", "use_dora": "x", "r": 0, "layers_pattern": "l"}
    )
    assert refusal(lambda: read_adapter(folder)).startswith(f"adapter: the settings of {folder} cannot be used (")
    (folder / "adapter_config.json").write_text("[]")
    assert "holds a list, not the settings of an adapter" in refusal(lambda: read_adapter(folder))
    folder = adapter(tmp_path / "c", SETTINGS, {"q_proj.lora_A.weight": torch.tensor([1.0, float("inf")])})
    assert "cannot be merged, 1 of its weights hold NaN or infinity" in refusal(lambda: read_adapter(folder))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickles_are_read_behind_a_flag_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = adapter(tmp_path / "a", SETTINGS)
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    assert refusal(lambda: read_adapter(folder)).startswith(f"allow_pickle: {folder / 'adapter_model.bin'} is a pickle")
    assert read_adapter(folder, allow_pickle=True).weights.keys() == state.keys()
    torch.save({"base_model.model.q_proj.lora_A.weight": Trap()}, folder / "adapter_model.bin")
    assert refusal(lambda: read_adapter(folder, allow_pickle=True)).startswith(
        f"adapter: the weights of {folder} cannot be"
    )
    assert not (tmp_path / "sprung").exists()


BASES = {
    "peft0.18.1_opt-125m_causal_guilhermmeabreu": (AutoModelForCausalLM, OPTConfig(vocab_size=300), 24),
    "peft0.4-0.5_gpt2_causal_yoonyerin": (AutoModelForCausalLM, GPT2Config(vocab_size=300, eos_token_id=0), 12),
    "peft0.17_distilbert_seqcls_modules_to_save_Tashu014": (DistilBertModel, DistilBertConfig(vocab_size=300), 14),
}


@real
@pytest.mark.parametrize("name", BASES)
@pytest.mark.long
def test_every_published_adapter_merges_into_a_base_of_its_shape(name, tmp_path):
    loader, config, modules = BASES[name]
    torch.manual_seed(0)
    model = loader(config) if loader is DistilBertModel else loader.from_config(config)
    model.save_pretrained(tmp_path / "base")
    folder = DATA / "adapters" / name
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = MergeOptions(
        adapter=[str(folder)], base=str(tmp_path / "base"), output_dir=str(tmp_path / "merged"), allow_pickle=True
    )
    merged = merge(options)
    assert merged.modules == modules and merged.largest_error is not None and merged.largest_error < 1e-6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    classifier = "seqcls" in name
    plain = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    adapted = PeftModel.from_pretrained(plain.from_pretrained(tmp_path / "base"), folder).eval()
    loaded, report = plain.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, adapted(ids).logits, atol=1e-4)
        plain_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base") if not classifier else None
        assert plain_base is None or not torch.allclose(plain_base.eval()(ids).logits, adapted(ids).logits, atol=1e-3)


@real
@pytest.mark.parametrize("stem, kind", [("03_Langchain-Chatchat", "PREFIX_TUNING"), ("08_llm-tuning", "PROMPT_TUNING")])
def test_methods_without_weights_to_add_are_refused_by_name(stem, kind, tmp_path):
    path = DATA / "adapter_configs" / f"{stem}.json"
    cleaned, _ = clean_settings(json.loads(path.read_text()), path)
    prompt_adapter = SavedAdapter(path, {}, build_peft_config(cleaned, path), {}, ())
    assert refusal(lambda: check_mergeable(prompt_adapter)) == (
        f"adapter: {path} cannot be merged, a {kind} adapter has no weights to add."
    )
