"""Preflight records the settings in force, and refuses what was not asked for. The matrix runs the real engines."""

import re
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LilyConfig, get_peft_model
from support import equal_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.placement import place_weights
from accel_llm.training import model_checks
from accel_llm.training import preflight as preflight_module
from accel_llm.training.optimizers import build_optimizer
from accel_llm.training.preflight import preflight


def prepare(accelerator, base, **settings):
    options = TrainOptions(model_name_or_path=str(base), packing=False, precision="fp32", **settings)
    model = load_model(options)
    place_weights(accelerator, model, options)
    optimizer = build_optimizer(model, options, "cpu", "none")
    return *accelerator.prepare(model, optimizer), options


def step(accelerator, model, optimizer) -> None:
    accelerator.backward(model(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum())
    optimizer.step()
    optimizer.zero_grad()


def test_facts_before_and_after_the_first_step(accelerator, tiny):
    model, optimizer, options = prepare(accelerator, tiny, method="full")
    facts = preflight(accelerator, model, optimizer, options)["accelerate"]
    count = sum(parameter.numel() for parameter in model.parameters())
    counts = {"trainable": count, "total": count, "this_process": count, "each_process": [count]}
    assert facts["parameters"] == counts and facts["engine"] == "LlamaForCausalLM"
    assert facts["products"].keys() == {"float32"}
    assert facts["attention_kernels"].keys() == {"scaled_dot_product_flash_attention_for_cpu"}
    assert facts["dtypes"] == {"trained": {"float32": 21}, "frozen": {}} and "first_step" not in facts
    step(accelerator, model, optimizer)
    assert facts["first_step"] == {"gradients": 21, "all_zero": 0, "without": []}
    assert facts["dtypes"]["stepped"] == facts["dtypes"]["optimizer_state"] == ["float32"]
    assert facts["dtypes"]["gradients"] == ["float32"] and facts["autocast"] is None
    step(accelerator, model, optimizer)
    assert facts["first_step"]["gradients"] == 21


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_record_says_what_is_and_not_what_the_options_ask_for(tiny, checkpointing):
    """Autocast and recomputed layers are seen in the forward and backward passes of the model."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, options = prepare(accelerator, tiny, method="full", gradient_checkpointing=checkpointing)
    assert options.precision == "fp32"
    facts = preflight(accelerator, model.train(), optimizer, options.model_copy(update={"precision": "bf16"}))[
        "accelerate"
    ]
    assert facts["products"].keys() == {"bfloat16"} and facts["optimizer"] == "torch.optim.adamw.AdamW"
    step(accelerator, model, optimizer)
    assert facts["autocast"] == "bfloat16" and facts["recomputed_in_backward"] == checkpointing
    assert facts["dtypes"]["gradients"] == ["float32"] and facts["compiled"] is None
    AcceleratorState._reset_state(True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("method", ["full", "lora"])
def test_products_in_another_dtype_than_was_asked_for_are_an_error(accelerator, tiny, method):
    model, optimizer, options = prepare(accelerator, tiny, method="full")
    if method == "lora":
        model = attach_adapter(model, options := options.model_copy(update={"method": "lora"}))
    with pytest.raises(RuntimeError, match=r"should run in torch.bfloat16, but most run in float32"):
        preflight(accelerator, model, optimizer, options.model_copy(update={"precision": "bf16"}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_an_adapter_is_tried_as_it_will_be_when_it_is_trained(accelerator, tiny, monkeypatch):
    """A fresh Lily adds nothing; a trained one mixes matrices by the average over all tokens, later ones too."""
    options = TrainOptions(model_name_or_path=str(tiny), packing=False, precision="fp32", method="lora")
    config = LilyConfig(task_type="CAUSAL_LM", r=4, num_B=2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(load_model(options), config)
    place_weights(accelerator, model, options)
    optimizer = build_optimizer(model, options, "cpu", "none")
    arguments = accelerator, *accelerator.prepare(model, optimizer), options
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="is not causal here"):
        preflight(*arguments)
    with model_checks._moved(model):
        assert not equal_tensors(before, model.state_dict())
    assert equal_tensors(before, model.state_dict())
    monkeypatch.setattr(model_checks, "_moved", nullcontext)
    assert preflight(*arguments)["accelerate"]["engine"] == "PeftModelForCausalLM"


def test_the_hash_is_that_of_the_weights_in_their_order(accelerator, tiny):
    model, *_ = prepare(accelerator, tiny, method="full")
    first, again = (preflight_module._check_equal_weights(accelerator, model) for _ in range(2))
    assert first == again and len(first) == 16
    layers = model.model.layers
    with torch.no_grad():
        a, b = layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight
        original = a.clone()
        a.copy_(b)
        b.copy_(original)
    assert preflight_module._check_equal_weights(accelerator, model) != first
    with torch.no_grad():
        b.copy_(a)
        a.copy_(original)
        a[0, 0] += 1e-6
    assert preflight_module._check_equal_weights(accelerator, model) != first


def test_parameters_without_a_gradient_are_named_before_any_step(accelerator, tiny):
    model, optimizer, options = prepare(accelerator, tiny, method="full")
    preflight(accelerator, model, optimizer, options)
    before = model.lm_head.weight.clone()
    model.model.norm.weight.register_hook(lambda gradient: gradient * 0)
    layer = model.model.layers[1].self_attn.q_proj
    detached = layer.forward
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.detach())
    with pytest.raises(ConfigError, match=r"1 of 21 trained .* no gradient .*layers\.1\.self_attn\.q_proj"):
        step(accelerator, model, optimizer)
    assert torch.equal(model.lm_head.weight, before)
    layer.forward = detached


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_trained_parameters_must_fit_the_method(accelerator, tiny, method):
    model, optimizer, options = prepare(accelerator, tiny, method="full")
    if method == "full":
        model.model.norm.weight.requires_grad = False
    else:
        options = options.model_copy(update={"method": "lora"})
    state, number = ("frozen", 1) if method == "full" else ("trained", 21)
    with pytest.raises(RuntimeError, match=f"method {method}: {number} parameters are {state}"):
        preflight(accelerator, model, optimizer, options)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_another_engine_than_the_launch_asks_for_is_an_error(accelerator, tiny, monkeypatch, strategy):
    model, optimizer, options = prepare(accelerator, tiny, method="full")
    monkeypatch.setattr(preflight_module, "strategy", lambda: strategy)
    with pytest.raises(RuntimeError, match=f"asks for {strategy}, but the model was prepared as LlamaForCausalLM"):
        preflight(accelerator, model, optimizer, options)


def test_fsdp2_in_bf16_trains_float32_parameters_and_the_record_says_so(accelerator, tiny, monkeypatch, tmp_path):
    """After a forward pass the outermost unit holds whole bf16 copies; the record is about the shards below them."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, optimizer, options = prepare(accelerator, tiny, method="full")
        options = options.model_copy(update={"precision": "bf16"})
        settings = {"mesh": init_device_mesh("cpu", (1,)), "mp_policy": MixedPrecisionPolicy(torch.bfloat16)}
        for layer in model.model.layers:
            fully_shard(layer, **settings)
        fully_shard(model, reshard_after_forward=None, **settings)
        monkeypatch.setattr(preflight_module, "strategy", lambda: "fsdp2")
        facts = preflight(accelerator, model, optimizer, options)["accelerate"]
    finally:
        torch.distributed.destroy_process_group()
    assert model.model.norm.weight.dtype == torch.bfloat16, "the copies that must not be counted"
    assert facts["dtypes"] == {"trained": {"float32": 21}, "frozen": {}}


@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_check_only_takes_a_few_steps_says_whether_the_run_can_start_and_keeps_nothing(
    script, tiny, chats, tmp_path, capsys, more
):
    folder = tmp_path / "never"
    script(
        *["sft", "--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--output_dir", folder],
        *["--check_only", "--num_train_epochs", 30, "--save_steps", 1, *more],
    )
    output = capsys.readouterr().out
    plan, verdict = output.split("\nchecked")
    assert not folder.exists() and str(folder) in plan
    assert verdict.rstrip().endswith("ready: start without --check_only")
    steps = re.search(r"steps +([\d,]+) of 1 row each, 30 epochs", plan)
    assert steps and "(median of 4 steps after the first one, which took " in verdict
    assert f"{steps[1]} steps take about " in verdict
    assert "single (PeftModelForCausalLM), 1 x cpu, fp32, attention packed" in verdict
    assert re.search(r"memory +peak [\d.]+ [GM]B, estimated [\d.]+ [GM]B, of ", verdict)
    if more:  # the table of all facts
        assert "first_step gradients" in plan and '"float32"' in plan
        names = {line.split()[0] for line in plan.split("In force, checked")[1].splitlines()[1:] if line.strip()}
        assert {"strategy", "engine", "parameters", "dtypes", "attention", "loss_path"} <= names
        assert "per_device_eval_batch_size" in plan and "<|im_start|>" in plan
    else:
        assert "In force, checked" not in output and "per_device_eval_batch_size" not in output
