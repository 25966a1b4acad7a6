"""PiSSA and OLoRA train as PEFT's do, and are saved as a plain LoRA that every program loads as what was trained.

The oracle is plain PEFT, whose changed base stays in memory, in float64.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from support import materialize, saved_bases
from transformers import AutoModelForCausalLM

from accel_llm.adapters import initial
from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.initial import OffsetFactor, start_from_base
from accel_llm.adapters.saved import save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.config.tool_options import ChatOptions, MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.load import load_with_adapter
from accel_llm.merge.merge import merge
from accel_llm.model.loading import load_model
from accel_llm.model.quantization import keep_gradients, quantized_weights, round_to_4_bits

pytestmark = pytest.mark.usefixtures("quiet")
CHAT = ChatOptions(model="-", load_in_4bit=False)
IDS = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(3))
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-alpha": {"init_lora_weights": "pissa", "lora_alpha": 3},
    "olora-rslora": {"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 5},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora-dora-head": {"init_lora_weights": "olora", "use_dora": True, "modules_to_save": ["lm_head"]},
    "pissa-embedding": {"init_lora_weights": "pissa", "lora_target_modules": ["q_proj", "embed_tokens"]},
    "pissa-rank-48-of-32": {"init_lora_weights": "pissa", "lora_r": 48},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return saved_bases(tmp_path_factory, ("llama", "gpt2"))


def attached(base: Path, **options: Any) -> PeftModel:
    settings = TrainOptions(**{"model_name_or_path": str(base), "packing": False, "lora_r": 4} | options)
    settings = adopt_adapter_options(settings)
    torch.manual_seed(0)
    return materialize(attach_adapter(load_model(settings), settings), settings)


def move(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Move all that is trained away from where it began, as training does; return it by name."""
    generator = torch.Generator().manual_seed(5)
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in state.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)
    return {name: parameter.detach().clone() for name, parameter in state.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def trained(base: Path, folder: Path, **options: Any) -> PeftModel:
    """A model whose adapter was moved and saved in `folder`."""
    model = attached(base, **options)
    save_adapter(model, folder, move(model), str(base))
    return model


def peft_oracle(base: Path, model: PeftModel) -> Any:
    """PEFT's own model on its changed base, with the trained values of `model`, in float64."""
    config = copy.deepcopy(model.peft_config["default"])
    torch.manual_seed(0)
    oracle: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).double()
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    return oracle


@pytest.mark.parametrize("family, case", [*(("llama", name) for name in list(CASES)[:7]), ("gpt2", "pissa")])
def test_logits_and_gradients_are_those_of_peft_with_its_changed_base(bases, family, case):
    model = attached(bases[family], **CASES[case])
    start = logits(model)
    assert distance(start, logits(AutoModelForCausalLM.from_pretrained(bases[family]))) < 5e-6
    move(model)
    oracle = peft_oracle(bases[family], model)
    for each in (model.double(), oracle):
        each.train()(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    # PEFT rounds the changed base to float32.
    assert distance(logits(model), logits(oracle)) < 2e-6 < 0.1 < distance(logits(model), start)
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and distance(parameter.grad, gradients[name]) < 2e-5, name


def test_steps_of_adamw_are_those_of_peft(bases):
    model = attached(bases["llama"], **CASES["pissa-alpha"])
    oracle = peft_oracle(bases["llama"], model).float()
    losses = []
    for each in (model, oracle):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(8):
            each_logits = each.train()(input_ids=IDS).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(each_logits, IDS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=2e-4, atol=0)
    assert losses[0][-1] < losses[0][0] - 1


def test_olora_works_on_gpt2_where_peft_takes_the_transposed_weight(bases):
    model = attached(bases["gpt2"], **CASES["olora"])
    plain = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    assert distance(logits(model), logits(plain)) < 5e-6
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_proj")
    weight = plain.transformer.h[0].attn.c_proj.weight.T.double()
    # OLoRA: B0 A0 are the first columns of Q times the first rows of R of the weight [out, in].
    q, r = torch.linalg.qr(weight)
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    torch.testing.assert_close(product, q[:, :4] @ r[:4], rtol=0, atol=1e-5)


def test_the_base_is_not_changed_and_in_bfloat16_a_run_begins_with_its_bits(bases):
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    for init in ("pissa", "olora"):
        model = attached(bases["llama"], init_lora_weights=init, precision="bf16")
        weights = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
        assert all(torch.equal(weights[name], parameter) for name, parameter in plain.named_parameters())
        assert torch.equal(logits(model), logits(plain))
        assert sum(isinstance(module, OffsetFactor) for module in model.modules()) == 28


def applied_by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + s B A in float64 by the base's names: what a program computes that reads r, alpha and the two factors."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["init_lora_weights"] is True
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    for name in weights:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            a, b = (factors[f"{key}.lora_{letter}.weight"].double() for letter in "AB")
            scaling = settings["lora_alpha"] / (math.sqrt(len(a)) if settings["use_rslora"] else len(a))
            weights[name] = weights[name] + scaling * (b @ a)
    return weights


@pytest.mark.parametrize("case", ["pissa", "olora", "pissa-alpha", "olora-rslora"])
def test_a_program_that_knows_nothing_of_first_values_computes_what_was_trained(bases, tmp_path, case):
    oracle = peft_oracle(bases["llama"], trained(bases["llama"], tmp_path, **CASES[case]))
    weights = applied_by_hand(bases["llama"], tmp_path)
    layers = {name: module for name, module in oracle.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        expected: Any = layer.get_base_layer().weight + layer.get_delta_weight("default")  # type: ignore[operator]
        assert distance(weights[f"{name}.weight"], expected) < 1e-6
        assert distance(weights[f"{name}.weight"], layer.get_delta_weight("default") + weights[f"{name}.weight"]) > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("family, case", [*(("llama", name) for name in CASES), ("gpt2", "pissa"), ("gpt2", "olora")])
def test_every_reader_gets_what_was_trained(bases, tmp_path, family, case):
    base = bases[family]
    options = CASES[case]
    expected = logits(trained(base, tmp_path / "adapter", **options))
    assert distance(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.1
    loaded = {
        "PEFT": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"),
        "chat": load_with_adapter(tmp_path / "adapter", str(base), CHAT),
        "continued": attached(
            base, adapter_name_or_path=str(tmp_path / "adapter"), lora_r=2 * options.get("lora_r", 4)
        ),
    }
    merge(MergeOptions(adapter=[str(tmp_path / "adapter")], output_dir=str(tmp_path / "merged"), verify="modules"))
    loaded["merged"] = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {name for name, model in loaded.items() if not distance(logits(model), expected) < 1e-5} == set()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_on_a_4_bit_base_plain_peft_loads_what_was_trained(bases, tmp_path, init, precision):
    """PEFT's own OLoRA quantizes the base again after the change, and no low-rank adapter can make up for that."""
    options = {"init_lora_weights": init, "method": "qlora", "precision": precision}
    model = trained(bases["llama"], tmp_path, **options)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    settings = model.config.quantization_config
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=kind, quantization_config=settings)
    keep_gradients(base)
    assert distance(logits(base), logits(model)) > 0.1
    assert distance(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model)) < 1e-6


@pytest.mark.parametrize("base", [{"method": "qlora"}, {"load_in_8bit": True}, {"method": "qlora", "use_dora": True}])
def test_pissa_on_a_quantized_base_begins_as_the_base_with_its_largest_directions(bases, base):
    """A0 and B0 come from the plain weights where these are at hand, else from the quantized ones (float64 SVD)."""
    model = attached(bases["llama"], init_lora_weights="pissa", **base)
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"])
    fresh = logits(model)
    with model.disable_adapter():
        assert distance(fresh, logits(model)) < 1e-6
    assert distance(fresh, logits(plain)) > 1e-4, "the base is quantized"
    for name, layer in initial.lora_layers(model).items():
        quantized = base.get("load_in_8bit") or base.get("use_dora")
        weight = (
            dequantize_module_weight(layer.get_base_layer()) if quantized else plain.get_parameter(f"{name}.weight")
        )
        u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        largest = (u[:, :4] * s[:4]) @ v[:4]
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert distance(layer.scaling["default"] * product, largest) < 1e-4, name


def test_gradients_of_pissa_on_a_4_bit_base_are_those_on_its_dequantized_weights(bases):
    """The oracle is a plain LoRA [B, -B0] [A; A0] on 16-bit weights that hold what the 4 bits stand for, in float64."""
    model = attached(bases["llama"], init_lora_weights="pissa", method="qlora")
    oracle: Any = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        for name in quantized_weights(oracle):
            oracle.get_parameter(name).copy_(round_to_4_bits(oracle.get_parameter(name), False))
    oracle = get_peft_model(oracle, initial.plain_config(model)).double()
    move(model)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    joined = initial.joined_factors(model, state)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(joined[name])
    for one in (model, oracle):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    expected = dict(oracle.named_parameters())
    for name in state:
        gradient = expected[name].grad
        half = gradient[:4] if "lora_A" in name else gradient[:, :4]
        assert distance(model.get_parameter(name).grad.double(), half) < 1e-4, name


@pytest.mark.parametrize(
    "base", [{}, {"method": "qlora"}, {"load_in_8bit": True}, {"method": "qlora", "use_dora": True}]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_orthogonal_factors_have_the_product_zero_on_every_base(bases, base, precision):
    """PEFT 0.21 rounds them to the base's dtype: in bf16 the product is not 0, and quantized bases raise an error."""
    model = attached(bases["llama"], init_lora_weights="orthogonal", precision=precision, **base)
    for layer in initial.lora_layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32
        assert (b @ a).norm() < 1e-5 * b.norm() * a.norm() and a.norm() > 0.1 < b.norm()


def peft_adapter(base: Path, folder: Path, init: str, **settings: Any) -> Any:
    """An adapter that plain PEFT trained and saved as it is, without a conversion; the model with its changed base."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=init, **settings)  # type: ignore[arg-type]
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    move(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_plain_peft_goes_on_from_its_own_start(bases, tmp_path, init):
    expected = logits(peft_adapter(bases["llama"], tmp_path / "first", init))
    model = attached(bases["llama"], adapter_name_or_path=str(tmp_path / "first"))
    assert distance(logits(model), expected) < 2e-6
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path / "second", state, str(bases["llama"]))
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert distance(logits(PeftModel.from_pretrained(base, tmp_path / "second")), expected) < 2e-6


@pytest.mark.parametrize("changes", [{"method": "qlora"}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_plain_peft_does_not_go_on_from_a_quantized_base(bases, tmp_path, init, changes):
    """PEFT quantizes what it leaves of the base; here the base is quantized first, which is another model."""
    peft_adapter(bases["llama"], tmp_path / "first", init)
    with pytest.raises(ConfigError, match=f"^adapter_name_or_path: .* init_lora_weights {init}, whose base in 4 or 8"):
        attached(bases["llama"], adapter_name_or_path=str(tmp_path / "first"), **changes)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_on_what_peft_left_of_the_base_is_refused_with_the_whole_base(bases, tmp_path, init):
    """Somebody saved the changed base as the base, and forgot to set init_lora_weights to true."""
    model = peft_adapter(bases["llama"], tmp_path / "adapter", init)
    rest = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                rest.get_submodule(name).weight.copy_(layer.get_base_layer().weight)
    rest.save_pretrained(tmp_path / "rest")
    sentence = r"did not begin with a part of this base, as its init_lora_weights says"
    with pytest.raises(ConfigError, match=rf"^adapter_name_or_path: .*adapter {sentence}"):
        attached(tmp_path / "rest", adapter_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=rf"^adapter: .*adapter {sentence}"):
        load_with_adapter(tmp_path / "adapter", str(tmp_path / "rest"), CHAT)
    options = {"adapter": [str(tmp_path / "adapter")], "output_dir": str(tmp_path / "merged")}
    with pytest.raises(ConfigError, match=sentence):
        merge(MergeOptions(**options, base=str(tmp_path / "rest")))  # type: ignore[arg-type]
    # As the sentence says.
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": True}))
    merge(MergeOptions(**options, base=str(tmp_path / "rest"), allow_other_base=True))  # type: ignore[arg-type]
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 2e-6


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_an_adapter_whose_base_nobody_can_compute_again_is_refused_everywhere(bases, tmp_path, init):
    folder = tmp_path / "adapter"
    peft_adapter(bases["llama"], folder, "gaussian")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": init}))
    sentence = re.escape(f"{folder} has init_lora_weights {init}, which took first values out of the base")
    with pytest.raises(
        ConfigError, match=rf"^adapter_name_or_path: {sentence}.*path_initial_model_for_weight_conversion"
    ):
        attached(bases["llama"], adapter_name_or_path=str(folder))
    with pytest.raises(ConfigError, match=f"^adapter: {sentence}"):
        load_with_adapter(folder, str(bases["llama"]), CHAT)
    with pytest.raises(ConfigError, match=f"^adapter: {sentence}"):
        merge(MergeOptions(adapter=[str(folder)], output_dir=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("changed", [{"scale": 0.5}, {"unmerge": True}, {"combination_type": "cat"}], ids=str)
def test_an_adapter_of_plain_peft_is_not_scaled_combined_or_taken_out(bases, tmp_path, changed):
    """PEFT would scale B A and leave B0 A0 as it is: neither the base nor a mixture."""
    peft_adapter(bases["llama"], tmp_path / "adapter", "pissa")
    adapters = [str(tmp_path / "adapter")] * (2 if "combination_type" in changed else 1)
    with pytest.raises(ConfigError, match="init_lora_weights pissa took first values out of its base, so it can only"):
        merge(MergeOptions(adapter=adapters, output_dir=str(tmp_path / "merged"), **changed))


def test_first_values_beside_an_adapter_to_go_on_from_are_refused(bases, tmp_path):
    trained(bases["llama"], tmp_path, **CASES["pissa"])
    with pytest.raises(
        ConfigError, match=r"^init_lora_weights: olora has no effect, because the weights of the adapter"
    ):
        attached(bases["llama"], adapter_name_or_path=str(tmp_path), lora_r=8, init_lora_weights="olora")


@pytest.mark.long
def test_a_resumed_run_keeps_the_first_values_that_it_began_with(script, tiny, chats, tmp_path, monkeypatch):
    """Also on a machine that computes other ones: here they are random, as a careless decomposition would be."""
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--learning_rate", 1e-2]
    words += ["--init_lora_weights", "pissa", "--lora_r", 4, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    script("sft", *words, "--output_dir", tmp_path / "whole")

    def other_start(model: Any, init: str, compute: torch.dtype) -> None:
        start_from_base(model, init, compute)
        for module in model.modules():
            if isinstance(module, OffsetFactor):
                module.weight.data.normal_()
                module.offset.normal_()

    monkeypatch.setattr("accel_llm.adapters.initial.start_from_base", other_start)
    script(
        "sft",
        *words,
        *("--output_dir", tmp_path / "parts"),
        *("--resume_from_checkpoint", tmp_path / "whole" / "checkpoints" / "step-00000002"),
    )
    with pytest.raises(
        ConfigError, match=r"init_lora_weights: .* was saved with 'pissa', this run has True; give the same"
    ):
        checkpoint = ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoints" / "step-00000002")
        changed = ("--init_lora_weights", "true", "--allow_changed", "init_lora_weights")
        script("sft", *words, *checkpoint, *changed, "--output_dir", tmp_path / "changed")
    whole, parts = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {tensor.shape[0] for name, tensor in whole.items() if "lora_A" in name} == {8}


def test_a_layer_without_such_first_values_keeps_its_rank_and_alpha(bases, tmp_path):
    trained(bases["llama"], tmp_path, **CASES["pissa-embedding"], lora_alpha=6)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (8, 12)
    assert settings["rank_pattern"] == {"model.embed_tokens": 4}
    assert settings["alpha_pattern"] == {"model.embed_tokens": 6}
    assert initial.REPEATABLE_INITS == ("pissa", "olora")
