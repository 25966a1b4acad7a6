"""4-bit weights get the values that bitsandbytes computes with, from 16-bit files and from 4-bit files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from accel_llm.config.tool_options import MergeOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError
from accel_llm.merge import compare_logits as compare_logits_module
from accel_llm.merge.compare_logits import SAMPLE_TEXT, SAMPLE_TOKENS
from accel_llm.merge.four_bit import unpack_4_bits
from accel_llm.merge.merge import MergeResult, merge
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.quantization import keep_gradients, quantized_weights, round_to_4_bits
from accel_llm.system.weights import WeightFiles

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]  # bitsandbytes' own, on a CPU
# The tokens of the comparison in its own process.
IDS = torch.tensor([build_demo_tokenizer()(SAMPLE_TEXT).input_ids[:SAMPLE_TOKENS]])


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load(folder: Path, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings)
    keep_gradients(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def trained(make_model, tmp_path) -> Any:
    """A base and an adapter that was made on its 4-bit weights, and the logits of the two."""

    def make(dtype: torch.dtype) -> tuple[Path, Path, torch.Tensor]:
        base = make_model(tmp_path / "base", dtype, hidden_size=64, intermediate_size=128)
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        wrapped = get_peft_model(load(base, quantization_config=four_bits(dtype)), config)
        wrapped.save_pretrained(tmp_path / "adapter")
        return base, tmp_path / "adapter", logits(wrapped)

    return make


def merge_adapter(adapter: Path, target: Path, **options: Any) -> MergeResult:
    return merge(MergeOptions(**({"adapter": [str(adapter)], "output_dir": str(target)} | options)))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_merging_into_dequantized_weights_keeps_the_logits_of_the_4_bit_base(trained, tmp_path, dtype, bound):
    base, adapter, expected = trained(dtype)
    ways = ("original", "dequantized")
    for way in ways:
        merge_adapter(adapter, tmp_path / way, base=str(base), merge_base=way)
    near = {way: distance(logits(load(tmp_path / way)), expected) for way in ways}
    assert near["dequantized"] <= bound < near["original"] < 0.5
    for way in ways:
        # Both errors are reported for either base, and they equal those of the adapter on real 4-bit layers.
        options = MergeOptions(adapter=[str(adapter)], output_dir="-", merge_base=way)
        differences = compare_logits_module._compare(tmp_path / way, base, [adapter], options)
        assert differences["merged"] <= bound
        assert differences["original"] == pytest.approx(near["original"], rel=0.1)
        assert differences["dequantized"] <= bound
    weights = {way: load_file(tmp_path / way / "model.safetensors") for way in ways}
    assert torch.equal(weights["original"]["lm_head.weight"], weights["dequantized"]["lm_head.weight"])


def test_weights_without_an_adapter_are_dequantized_too(make_model, tmp_path):
    base = make_model(tmp_path / "base", torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(base), merge_base="dequantized")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    names = quantized_weights(load(base))
    assert len(names) == 14 and not any(names.values())
    for name in before:
        if name in names and "q_proj" not in name:
            assert torch.equal(after[name], round_to_4_bits(before[name], False))
            assert not torch.equal(after[name], before[name])
        elif name not in names:
            assert torch.equal(after[name], before[name])


@pytest.mark.long
def test_a_base_with_4_bit_files_is_unpacked(trained, tmp_path):
    base, adapter, expected = trained(torch.bfloat16)
    stored = tmp_path / "stored"
    load(base, quantization_config=four_bits(torch.bfloat16)).save_pretrained(stored)
    with pytest.raises(ConfigError) as error:
        merge_adapter(adapter, tmp_path / "merged", base=str(stored))
    assert str(error.value) == (
        "merge_base: original needs the base's original weights, but the base holds only 4-bit ones; set merge_base: "
        "dequantized, or name the base model in 16 bits with --base."
    )
    result = merge_adapter(adapter, tmp_path / "merged", base=str(stored), merge_base="dequantized", verify="logits")
    assert result.differences.keys() == {"merged", "dequantized"}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "dequantized base: merged logits differ from those of the adapter on its 4-bit base by " in card
    merge_adapter(adapter, tmp_path / "other", base=str(base), merge_base="dequantized")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    model = load(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config") and distance(logits(model), expected) <= 2e-2


@pytest.mark.parametrize(
    "settings, how",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes"),
    ],
)
def test_other_quantized_bases_are_refused(make_model, tmp_path, settings, how):
    config = read_model_config(make_model(tmp_path / "base"), False)
    config.quantization_config = settings
    with pytest.raises(
        ConfigError, match=rf"^base: its weights are quantized \({how}\); name the base model in 16 or 32 bits"
    ):
        unpack_4_bits(WeightFiles({}, {}, {}), config, "dequantized")


def test_transposed_weights_are_rounded_in_blocks_of_their_rows():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_to_4_bits(weight, True), round_to_4_bits(weight.T.contiguous(), False).T)
    assert not torch.equal(round_to_4_bits(weight, True), round_to_4_bits(weight, False))
    assert distance(round_to_4_bits(weight, False), weight) == pytest.approx(0.09, abs=0.03)


def test_the_adapter_gives_equal_logits_on_dequantized_and_on_4_bit_weights(trained):
    base, adapter, expected = trained(torch.float32)
    model = load(base)
    for name, turned in quantized_weights(model).items():
        weight = model.get_parameter(name)
        weight.data = round_to_4_bits(weight.data, turned)
    assert distance(logits(PeftModel.from_pretrained(model, adapter)), expected) < 1e-5
