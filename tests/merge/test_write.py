"""Merged files are bit-equal to those of PEFT's `merge_and_unload` and `save_pretrained`, for all methods and families."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_methods import FAMILY_OF_EACH, METHODS, UNMERGEABLE, lora, randomize
from safetensors.torch import load_file, save_file
from support import relative_distance
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
    ViTConfig,
    ViTModel,
)

from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge import compare_logits as compare_logits_module
from accel_llm.merge.merge import MergeResult, merge

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of tied weights and of what it corrects itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **extra: LlamaConfig(**(SHAPE | HEADS | {"attention_bias": True} | extra)),
    "gpt2": lambda: GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
    "phi3": lambda: Phi3Config(**SHAPE, **HEADS),
    "lfm2": lambda: Lfm2Config(**SHAPE, **HEADS, layer_types=["conv", "full_attention"]),
    "mixtral": lambda: MixtralConfig(**SHAPE, **HEADS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **HEADS, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
}


def make(folder: Path, family: str, config: Any, dtype: torch.dtype = torch.float32, **extra: Any) -> None:
    """A base in `folder`/base and an adapter for it in `folder`/adapter."""
    torch.manual_seed(0)
    loader = AutoModelForSequenceClassification if config.task_type == "SEQ_CLS" else AutoModelForCausalLM
    base = loader.from_config(FAMILIES[family](**extra), dtype=dtype)
    randomize(base)
    base.save_pretrained(folder / "base")
    wrapped = get_peft_model(loader.from_pretrained(folder / "base", dtype="auto"), config)
    randomize(wrapped)
    wrapped.save_pretrained(folder / "adapter")


def reference(folder: Path, dtype: torch.dtype, task: str = "CAUSAL_LM") -> dict[str, torch.Tensor]:
    loader: Any = AutoPeftModelForSequenceClassification if task == "SEQ_CLS" else AutoPeftModelForCausalLM
    loader.from_pretrained(folder / "adapter", dtype=dtype).merge_and_unload().save_pretrained(folder / "reference")
    return tensors(folder / "reference")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merge_adapter(folder: Path, **options: Any) -> MergeResult:
    target = options.pop("output_dir", folder / "merged")
    values = {"adapter": [str(folder / "adapter")], "base": str(folder / "base"), "output_dir": str(target)} | options
    return merge(MergeOptions(**values))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


# One family of each in the default suite; all in float32 and in one of the narrow formats.
CASES = [pytest.param(name, torch.bfloat16) for name in FAMILY_OF_EACH]
CASES += [pytest.param(name, torch.float32, marks=pytest.mark.long) for name in METHODS]
CASES += [
    pytest.param(name, (torch.float16, torch.bfloat16)[k % 2], marks=pytest.mark.long)
    for k, name in enumerate(METHODS)
    if name not in FAMILY_OF_EACH
]


def test_the_tables_have_every_method_of_peft():
    made = {config().peft_type for config in (*METHODS.values(), *(config for config, _ in UNMERGEABLE.values()))}
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) - made == {"XLORA"}  # it needs adapters


@pytest.mark.parametrize("name, dtype", CASES)
def test_every_mergeable_method_gives_the_bits_of_peft(tmp_path, name, dtype):
    make(tmp_path, "llama", METHODS[name](), dtype)
    result = merge_adapter(tmp_path)
    assert_same(tensors(tmp_path / "merged"), reference(tmp_path, dtype))
    assert result.modules and result.largest_error is not None and result.dtype == dtype
    base = tensors(tmp_path / "base")
    changed = {key for key, tensor in tensors(tmp_path / "merged").items() if not torch.equal(tensor, base[key])}
    assert changed  # that nothing was merged would be the same bits as well
    if dtype == torch.float32:  # PEFT could merge something else than it computes
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(3, 43)[None]
        with torch.no_grad():
            assert relative_distance(merged.eval()(ids).logits, adapted(ids).logits) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("prompt", "shadow") else pytest.mark.long) for name in UNMERGEABLE]
)
def test_methods_that_cannot_be_merged_are_refused_by_name(tmp_path, name):
    config, reason = UNMERGEABLE[name]
    make(tmp_path, "llama", config())
    with pytest.raises(ConfigError) as error:
        merge_adapter(tmp_path, verify="none")
    assert str(error.value).startswith(f"adapter: {tmp_path / 'adapter'} cannot be merged, {reason}")
    assert not (tmp_path / "merged").exists() and not (tmp_path / ".merged.partial").exists()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, config",
    [
        ("gpt2", lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
        ("phi3", lora),
        ("mixtral", lambda: lora(target_modules=["q_proj"])),
        ("mixtral", lambda: lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
        ("qwen3_moe", lambda: lora(target_modules=["q_proj"], target_parameters=EXPERTS[:1])),
        ("qwen3_moe", lambda: lora(target_modules=["q_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])),
    ],
    ids=["gpt2", "phi3", "mixtral", "mixtral-experts", "qwen3_moe-gate_up", "qwen3_moe-router"],
)
def test_families_whose_files_differ_from_the_model_have_the_bits_and_names_of_peft(tmp_path, family, config, dtype):
    make(tmp_path, family, config(), dtype)
    merge_adapter(tmp_path)
    assert_same(tensors(tmp_path / "merged"), reference(tmp_path, dtype))
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "base").keys()
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_convolutions_have_the_bits_of_peft(tmp_path, task, dtype):
    """Of the patches of a vision transformer, which is loaded by the class that its config names."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).to(dtype)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["projection", "q_proj"], task_type=task, use_dora=task is None)
    wrapped = get_peft_model(ViTModel.from_pretrained(tmp_path / "base", dtype=dtype), config)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    result = merge_adapter(tmp_path)
    base = ViTModel.from_pretrained(tmp_path / "base", dtype=dtype)
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "reference"
    )
    assert_same(tensors(tmp_path / "merged"), tensors(tmp_path / "reference"))
    assert result.modules == 3 and result.largest_error is not None
    with pytest.raises(ConfigError, match=r"^verify: logits are compared on a text, but this is not a language model"):
        compare_logits_module._sample_ids(tmp_path / "merged", base, False)  # type: ignore[arg-type]


def test_a_layer_that_peft_cannot_merge_is_refused_by_name(tmp_path):
    make(tmp_path, "lfm2", lora(target_modules=["conv.conv", "in_proj"], r=64))
    with pytest.raises(ConfigError) as error:
        merge_adapter(tmp_path)
    assert str(error.value) == (
        "adapter: model.layers.0.conv.conv cannot be merged, a LORA layer of PEFT refuses it (Merging is not supported for "
        "_ConvNd layers with groups > 1!)."
    )
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_separate_experts_merges_into_stacked_experts(tmp_path):
    """As transformers 4 had them, and as adapters of its time name them; PEFT converts the one, we the other."""
    make(tmp_path, "mixtral", lora(target_modules=["q_proj"], target_parameters=EXPERTS))
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    old = {name: tensor for name, tensor in state.items() if "experts" not in name}
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        for expert in range(4):
            for part, (rows, columns) in {"w1": (128, 64), "w3": (128, 64), "w2": (64, 128)}.items():
                name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.lora_"
                old[f"{name}A.weight"] = torch.randn(4, columns, generator=generator)
                old[f"{name}B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(old, tmp_path / "adapter" / "adapter_model.safetensors")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text()) | {
        "target_modules": ["q_proj", "w1", "w2", "w3"],
        "target_parameters": None,
    }
    path.write_text(json.dumps(settings | {"rank_pattern": {}, "alpha_pattern": {}}))
    merge_adapter(tmp_path)
    actual, base = tensors(tmp_path / "merged"), tensors(tmp_path / "base")
    assert_same(actual, reference(tmp_path, torch.float32))
    scale = settings["lora_alpha"] / 4
    for part in ("w1", "w2", "w3"):
        name = f"model.layers.1.block_sparse_moe.experts.3.{part}"
        delta = old[f"base_model.model.{name}.lora_B.weight"] @ old[f"base_model.model.{name}.lora_A.weight"] * scale
        assert torch.allclose(actual[f"{name}.weight"], base[f"{name}.weight"] + delta, atol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_classifiers_and_reward_models_get_the_trained_head(tmp_path, labels):
    make(tmp_path, "llama", lora(task_type="SEQ_CLS", target_modules=["q_proj"]), num_labels=labels)
    state = load_file(tmp_path / "base" / "model.safetensors")
    expected = reference(tmp_path, torch.float32, "SEQ_CLS") if labels == 2 else None
    # The base is a language model as it is published: it has no such head.
    del state["score.weight"]
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        config.pop(key, None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    merge_adapter(tmp_path)
    actual = tensors(tmp_path / "merged")
    assert expected is None or not assert_same(actual, expected)
    assert actual["score.weight"].shape == (labels, 64)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and loaded.config.num_labels == labels
    assert loaded.config.architectures == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize(
    "config, tied",
    [
        (lambda: lora(target_modules=["q_proj"]), True),
        (lambda: lora(target_modules=["embed_tokens"]), False),
        (lambda: lora(target_modules=["lm_head"]), False),
        (lambda: lora(target_modules=["embed_tokens", "lm_head"]), False),
        (lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
        (lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]), False),
        (lambda: lora(target_modules=["q_proj"], trainable_token_indices=[3, 7]), True),
    ],
    ids=["neither", "embedding", "head", "both", "saved-head", "saved-both", "tokens"],
)
def test_tied_embeddings_stay_tied_or_the_config_says_so(tmp_path, config, tied):
    make(tmp_path, "llama", config(), tie_word_embeddings=True)
    merge_adapter(tmp_path)
    assert ("lm_head.weight" in tensors(tmp_path / "merged")) is not tied
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-4)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_equal_matrices_that_the_files_hold_twice_are_tied(tmp_path):
    make(tmp_path, "llama", lora(target_modules=["q_proj"]), tie_word_embeddings=True)
    state = load_file(tmp_path / "base" / "model.safetensors")
    for value, tied in ((state["model.embed_tokens.weight"].clone(), True), (torch.randn(300, 64), False)):
        save_file(state | {"lm_head.weight": value}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        merge_adapter(tmp_path, overwrite_output_dir=True)
        actual = tensors(tmp_path / "merged")
        assert_same(actual, reference(tmp_path, torch.float32))
        assert ("lm_head.weight" not in actual) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_written(tmp_path, tied):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"](tie_word_embeddings=tied))
    randomize(base)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(310)
    wrapped = get_peft_model(base, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.vocab_size == 310 and loaded.get_input_embeddings().weight.shape == (310, 64)
    ids = torch.arange(270, 310)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, wrapped.eval()(ids).logits, atol=1e-5)


def test_weights_without_an_adapter_are_copied_byte_by_byte(tmp_path):
    make(tmp_path, "llama", lora(target_modules=["q_proj"]), torch.bfloat16)
    # Numbers that no arithmetic would leave as they are: NaN with a payload, negative zero, denormals.
    state = load_file(tmp_path / "base" / "model.safetensors")
    odd = torch.tensor([0x7FC1, -0x8000, 0x0001, 0x7F80] * 16, dtype=torch.int16).view(torch.bfloat16)
    state["model.norm.weight"] = odd
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(tmp_path)
    actual = tensors(tmp_path / "merged")["model.norm.weight"]
    assert torch.equal(actual.view(torch.int16), odd.view(torch.int16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chosen_dtype_has_the_bits_of_peft_in_that_dtype(tmp_path, dtype):
    make(tmp_path, "llama", lora())
    assert merge_adapter(tmp_path, dtype=dtype).dtype == getattr(torch, dtype)
    assert_same(tensors(tmp_path / "merged"), reference(tmp_path, getattr(torch, dtype)))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_shards_have_the_requested_size_and_load(tmp_path):
    make(tmp_path, "llama", lora())
    merge_adapter(tmp_path, max_shard_size="100KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 110_000
    assert_same(tensors(tmp_path / "merged"), reference(tmp_path, torch.float32))
    assert_same(
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()), tensors(tmp_path / "merged")
    )
    # A base in shards is read as well.
    merge_adapter(tmp_path, base=str(tmp_path / "merged"), output_dir=tmp_path / "twice", verify="none")
    assert tensors(tmp_path / "twice").keys() == tensors(tmp_path / "merged").keys()


def delta(folder: Path) -> dict[str, torch.Tensor]:
    merge_adapter(folder, output_dir=folder / "whole", verify="none", overwrite_output_dir=True)
    base = tensors(folder / "base")
    return {name: tensor - base[name] for name, tensor in tensors(folder / "whole").items()}


def test_scale_multiplies_what_an_adapter_adds(tmp_path):
    make(tmp_path, "llama", lora())
    whole, base = delta(tmp_path), tensors(tmp_path / "base")
    merge_adapter(tmp_path, scale=-0.5)
    for name, tensor in tensors(tmp_path / "merged").items():
        assert torch.allclose(tensor, base[name] - 0.5 * whole[name], atol=1e-6)


def test_only_lora_can_be_scaled(tmp_path):
    make(tmp_path, "llama", METHODS["ia3"]())
    with pytest.raises(ConfigError, match=r"^scale: 0.5 works with LoRA only"):
        merge_adapter(tmp_path, scale=0.5)


def several(folder: Path, *configs: Any) -> list[str]:
    names = []
    for k, config in enumerate(configs):
        make(folder / str(k), "llama", config)
        with torch.no_grad():
            path = folder / str(k) / "adapter" / "adapter_model.safetensors"
            generator = torch.Generator().manual_seed(k)
            state = load_file(path)
            save_file({name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in state.items()}, path)
        names.append(str(folder / str(k) / "adapter"))
    return names


def test_concatenated_adapters_add_their_weighted_sum(tmp_path):
    names = several(tmp_path, lora(r=4), lora(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=3))
    base = str(tmp_path / "0" / "base")
    options = {"adapter": names, "base": base, "adapter_weights": [0.7, -0.4]}
    result = merge_adapter(tmp_path, **options)
    first, second = delta(tmp_path / "0"), delta(tmp_path / "1")
    for name, tensor in tensors(tmp_path / "merged").items():
        expected = tensors(tmp_path / "0" / "base")[name] + 0.7 * first[name] - 0.4 * second[name]
        assert torch.allclose(tensor, expected, atol=1e-5), name
    assert result.largest_error is not None and result.largest_error < 1e-5
    assert "combined by cat, weights 0.7, -0.4" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties"])
def test_combined_adapters_have_the_bits_of_peft(tmp_path, how):
    names = several(tmp_path, lora(), lora())
    base = tmp_path / "0" / "base"
    settings = {"combination_type": how} | ({} if how == "linear" else {"density": 0.4})
    merge_adapter(tmp_path, adapter=names, base=str(base), adapter_weights=[0.6, 0.4], seed=5, **settings)
    wrapped: Any = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), names[0], adapter_name="adapter0"
    )
    wrapped.load_adapter(names[1], "adapter1")
    torch.manual_seed(5)
    wrapped.add_weighted_adapter(["adapter0", "adapter1"], [0.6, 0.4], "both", **settings)
    wrapped.set_adapter("both")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "reference")
    assert_same(tensors(tmp_path / "merged"), tensors(tmp_path / "reference"))


def test_adapters_that_cannot_be_combined_are_refused(tmp_path):
    names = several(tmp_path, lora(), lora(r=2))
    bases = ", ".join(str(tmp_path / k / "base") for k in "01")
    with pytest.raises(ConfigError) as error:
        merge_adapter(tmp_path, adapter=names, base=None)
    assert str(error.value) == f"base: the adapters name different bases ({bases}); choose one with --base."
    options = {"adapter": names, "base": str(tmp_path / "0" / "base")}
    with pytest.raises(ConfigError, match=r"^combination_type: linear cannot combine these adapters"):
        merge_adapter(tmp_path, combination_type="linear", **options)
    names = several(tmp_path / "saved", lora(modules_to_save=["lm_head"]), lora())
    with pytest.raises(ConfigError, match=r"^adapter: adapters with whole modules"):
        merge_adapter(tmp_path, adapter=names, base=options["base"])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["lora", "rank", "loha", "oft", "ia3"])
def test_merged_minus_adapter_is_the_base(tmp_path, name, dtype, bound):
    make(tmp_path, "llama", METHODS[name](), dtype)
    merge_adapter(tmp_path)
    result = merge_adapter(tmp_path, base=str(tmp_path / "merged"), output_dir=tmp_path / "again", unmerge=True)
    base, again = tensors(tmp_path / "base"), tensors(tmp_path / "again")
    for key, tensor in base.items():
        assert float((again[key].float() - tensor.float()).norm()) <= bound * float(tensor.float().norm()), key
    assert result.largest_error is not None and result.largest_error < bound
    first = "model.layers.0.self_attn.k_proj.weight" if name == "ia3" else "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tensors(tmp_path / "merged")[first], base[first])


@pytest.mark.parametrize("name", ["dora", "saved", "tokens"])
def test_replaced_weights_cannot_be_unmerged(tmp_path, name):
    make(tmp_path, "llama", METHODS[name]())
    merge_adapter(tmp_path)
    with pytest.raises(
        ConfigError, match=r"cannot be unmerged, .*the base's weights that it replaced or normalized are in no file"
    ):
        merge_adapter(tmp_path, base=str(tmp_path / "merged"), output_dir=tmp_path / "again", unmerge=True)


def test_progress_counts_bytes(tmp_path):
    make(tmp_path, "llama", lora())
    calls: list[tuple[int, int]] = []
    options = MergeOptions(
        adapter=[str(tmp_path / "adapter")], base=str(tmp_path / "base"), output_dir=str(tmp_path / "merged")
    )
    merge(options, lambda written_bytes, total: calls.append((written_bytes, total)))
    total = sum(tensor.numel() * 4 for tensor in tensors(tmp_path / "base").values())
    assert {entry[1] for entry in calls} == {total}
    assert [written_bytes for written_bytes, _ in calls] == sorted(
        written_bytes for written_bytes, _ in calls
    ) and calls[-1] == (total, total)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read and reset the peak")
def test_memory_is_bounded_by_the_largest_weight_and_not_by_the_model(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 2000}
    make(tmp_path, "llama", lora(), **sizes)
    merge_adapter(tmp_path, output_dir=tmp_path / "first")  # what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before = resident("VmRSS")
    merge_adapter(tmp_path)
    weight = 512 * 4096 * 4
    assert sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")) > 18 * weight
    assert resident("VmHWM") - before < 6 * weight
