"""In a micro-batch the host waits for no result of the device: each wait would leave the device without work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answer_batches import LAYOUTS as ANSWER_LAYOUTS
from answer_batches import answer_batch, random_pairs
from peft import LoraConfig, get_peft_model
from support import SCALED, character_tokenizer, make_rows, materialize, random_rows, scaled_model, tiny_model
from waits import noted_waits

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.adapters.methods import REFUSED_METHODS, check_method, peft_methods
from accel_llm.config.options import RunOptions, TrainOptions
from accel_llm.data.batches import Batch, collate_packed, collate_padded, to_device
from accel_llm.data.stream import TrainingPlan
from accel_llm.model.attention import enable_packing, enable_padding
from accel_llm.model.loading import load_model
from accel_llm.model.log_probabilities import answer_log_probabilities
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.neftune import attach_neftune
from accel_llm.model.positions import scale_by_document
from accel_llm.report.metrics import Meter
from accel_llm.report.record import Record
from accel_llm.training.evaluation import mean_loss

# Actions that wait, by what they are called in the notes.
WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "_local_scalar_dense": lambda values: float(values.sum()),
    "is_nonzero": lambda values: bool((values > 1).any()),
    "tolist": lambda values: values.tolist(),
    "nonzero": lambda values: values.nonzero(),
    "index": lambda values: values[values > 1],
    "index_put_": lambda values: values.__setitem__(values > 1, 0),
    "masked_select": lambda values: values.masked_select(values > 1),
    "_unique2": lambda values: values.unique(),
    "repeat_interleave": lambda values: values.repeat_interleave(values),
    "numpy": lambda values: values.numpy(),
    "cpu": lambda values: values.cpu(),
    "_linalg_check_errors": lambda values: torch.linalg.solve(torch.eye(4), values.float()),
    "_coalesce": lambda values: torch.sparse_coo_tensor(values[None], values, (4,), check_invariants=False).coalesce(),
    "add": lambda values: values + torch.sparse_coo_tensor(values[None], values, (4,), check_invariants=False),
    "a copy of a tensor": lambda values: values * torch.arange(4).to(values.device),
    "a copy of numbers": lambda values: values * torch.tensor([1, 2, 3, 4], device=values.device),
}
QUIET: dict[str, Callable[[torch.Tensor], Any]] = {
    "positions": lambda values: values.index_select(0, values[:2]) + values[values[1:3]],
    "where": lambda values: torch.where(values > 1, values, 0).masked_fill(values < 3, 2),
    "repeat_interleave": lambda values: values.repeat_interleave(values, output_size=6),
    "numbers": lambda values: values * 2.5 + values.sum() / 3,
    "on the host": lambda values: float(torch.arange(3).sum()),
    "made there": lambda values: values * torch.arange(4, device=values.device).to(values.device),
    "solve_ex": lambda values: torch.linalg.solve_ex(torch.eye(4), values.float()).result,
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_noted(name: str) -> None:
    values = torch.arange(4)
    with noted_waits([values]) as waits:
        WAITING[name](values)
    kinds = [wait.split(" in ")[0] for wait in waits]
    assert name in kinds or (name == "is_nonzero" and kinds), waits


@pytest.mark.parametrize("name", QUIET)
def test_what_needs_no_value_on_the_host_is_no_wait(name: str) -> None:
    values = torch.arange(4)
    with noted_waits([values]) as waits:
        QUIET[name](values)
    assert waits == []


# --- micro-batches ---

STOCK = {"hyperclovax": {}, "mixtral": {"output_router_logits": True}, "qwen3_moe": {"output_router_logits": True}}
# What `tiny_model` builds; then how it is trained.
CASES = ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "mixtral", "qwen3_moe"]
CASES += [f"{family} stock" for family in STOCK] + [kind for kind in SCALED if kind != "phimoe longrope"]
CASES += ["llama recomputed", "llama lora", "llama qlora", "llama neftune", "gemma2 lora recomputed neftune"]


def build(case: str, packed: bool, tiny: Path) -> torch.nn.Module:
    """Return the model of a case, as a run would train it."""
    family, *how = case.split()
    if "qlora" in how:
        options = TrainOptions(
            model_name_or_path=str(tiny), method="qlora", packing=packed, gradient_checkpointing=True
        )
        return materialize(attach_adapter(load_model(options), options), options)
    model: Any = (
        scaled_model(case) if case in SCALED else tiny_model(family, **(STOCK[family] if "stock" in how else {}))
    )
    scale_by_document(model)
    (enable_packing if packed else enable_padding)(model)
    expected = "stock" if "stock" in how else "own"
    assert attach_loss(model.train(), 1024, label_smoothing=0.1, z_loss_coef=0.01) == expected
    model.loss_chunks = 3
    if "recomputed" in how:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if "lora" in how:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    attach_neftune(model, 5.0 if "neftune" in how else None)
    return model.train()


def new_batch(packed: bool, weighted: bool) -> Batch:
    """Return documents on both sides of the 8 tokens of `scaled_model`."""
    rows = random_rows(6, 20)
    weights = [torch.rand(len(ids)).numpy() for ids, _ in rows] if weighted else None
    return collate_packed(rows, weights) if packed else collate_padded(rows, 0, weights)


LAYOUTS = [
    pytest.param(packed, weighted, id=f"{'packed' if packed else 'padded'}{' weighted' if weighted else ''}")
    for packed in (True, False)
    for weighted in (False, True)
]
# peft 0.21.2 asks for a property that transformers 5.23 deprecates
DEPRECATED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@DEPRECATED
@pytest.mark.parametrize(("packed", "weighted"), LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_no_micro_batch_waits(case: str, packed: bool, weighted: bool, tiny: Path, accelerator, tmp_path: Path) -> None:
    model = build(case, packed, tiny)
    meter = Meter(
        accelerator, RunOptions(output_dir=str(tmp_path)), TrainingPlan(4, 2, None, 8), Record(tmp_path, True)
    )
    batch = to_device(new_batch(packed, weighted), torch.device("cpu"))
    # On purpose model/positions.py computes frequencies on the CPU; here the device has the same name.
    on_device = () if case in SCALED else (model, batch)
    with noted_waits(*on_device) as waits:
        loss = next_token_loss(model, batch)
        (loss / 7).backward()
        meter.add(loss, batch)
    assert waits == []
    assert meter.state()[0] == float(loss.detach()) > 0 and meter.state()[2] == batch["num_targets"]
    assert any(parameter.grad is not None for parameter in model.parameters())


ANSWERING = ["llama", "gemma2", "gpt_oss", "mixtral", "hyperclovax stock", "mixtral stock", "llama recomputed"]
ANSWERING += ["llama lora", "llama qlora", "gemma2 lora recomputed neftune"]


QUICK_ANSWERING = [("llama", "padded"), ("hyperclovax stock", "padded"), ("llama", "shared"), ("gpt_oss", "shared")]
QUICK_ANSWERING += [("llama qlora", "shared"), ("gemma2 lora recomputed neftune", "shared")]
ANSWER_CASES = [(case, layout) for case in ANSWERING for layout in ANSWER_LAYOUTS]


@DEPRECATED
@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(*case, marks=[] if case in QUICK_ANSWERING else pytest.mark.long) for case in ANSWER_CASES],
)
def test_no_batch_of_answers_waits(case: str, layout: str, tiny: Path) -> None:
    model = build(case, layout != "padded", tiny)
    batch = to_device(answer_batch(random_pairs(), layout), torch.device("cpu"))
    with noted_waits(model, batch) as waits:
        scores = answer_log_probabilities(model, batch, squares=True)
        scores.sums.sum().backward()
        with torch.no_grad():
            answer_log_probabilities(model.eval(), batch)
    assert waits == []
    assert any(parameter.grad is not None for parameter in model.parameters())


# Families whose own code waits, and how often in a forward of two layers: nothing of ours does.
WAIT_THEMSELVES = {
    # compares the largest position, for short and for long documents, and copies the factors of both
    "phimoe longrope": (8, "modeling_(phimoe|rope_utils).py"),
    "jetmoe": (4, "modeling_jetmoe.py"),  # splits tokens by expert, twice in a layer
    "lfm2": (1, "masking_utils.py"),  # asks whether there is padding, for layers that are no attention
    "falcon_h1": (1, "masking_utils.py"),
}


@pytest.mark.parametrize("case", WAIT_THEMSELVES)
def test_some_families_wait_in_their_own_code(case: str, tiny: Path) -> None:
    model, batch = build(case, False, tiny), new_batch(False, True)
    with noted_waits(model, batch) as waits:
        next_token_loss(model, batch).backward()
    number, files = WAIT_THEMSELVES[case]
    assert len(waits) == number and all(re.search(f" in {files}:", wait) for wait in waits), waits


# Methods whose layers wait in PEFT 0.21, in a forward and its backward, and where.
METHODS_THAT_WAIT = {
    # reads the sizes of a sparse matrix, sorts its places, and picks them out of a gradient
    "frod": {"tolist in layer.py", "_coalesce in layer.py", "sparse_mask in autograd"},
    # copies the wavelet, and leaves out places outside of the matrix, of which there are none
    "waveft": {"a copy of a tensor in waverec2d.py", "index in layer.py", "index_put in autograd"},
}
METHODS = [name for name in peft_methods() if name not in REFUSED_METHODS]
QUICK = ("boft", "frod", "p_tuning", "shira", "vblora", "waveft")


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore:(?s).*(Unsupported layer|CUDA ext|butterfly_factor|no bias term|Sparse inv)")
@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.long) for m in METHODS])
def test_no_method_waits_in_a_micro_batch(method: str, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1, attention_bias=True).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    chosen = {"token_indices": [5, 9]} if method == "trainable_tokens" else {}
    options = TrainOptions(model_name_or_path=str(tmp_path), method=method, method_options=chosen, max_length=64)
    options = fill_method_options(options)
    check_method(options)
    model = materialize(attach_adapter(load_model(options), options), options).train()
    batch = collate_packed(random_rows(6, 20), None, options.virtual_tokens)
    with noted_waits(model, batch) as waits:
        next_token_loss(model, batch).backward()
    places = {re.sub(r"\S*test_waits.py", "autograd", wait.split(":")[0]) for wait in waits}
    assert places == METHODS_THAT_WAIT.get(method, set()), waits


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_waits_once_for_all_its_batches(packing: bool, tiny: Path, accelerator) -> None:
    encoded = [(k, ids.tolist(), labels.tolist()) for k, (ids, labels) in enumerate(random_rows(9, 12))]
    rows, model = (
        make_rows(encoded, [np.ones(len(ids)).tolist() for _, ids, _ in encoded]),
        build("llama", packing, tiny),
    )
    options = TrainOptions(packing=packing, max_length=20, per_device_eval_batch_size=2)
    with noted_waits() as waits:
        mean_loss(accelerator, model, rows, options, 0)
    assert len(waits) == 1 and "evaluation.py" in waits[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DEPRECATED
@pytest.mark.parametrize(("packed", "weighted"), LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_no_micro_batch_waits_on_a_gpu(case: str, packed: bool, weighted: bool, tiny: Path) -> None:
    model = build(case, packed, tiny).cuda()
    # torch 2.11 has no wait in the products of experts in bf16 on Hopper, and autocast leaves them alone. In float32,
    # which method full trains, and on older GPUs it reads on the host where each expert begins.
    if any("Experts" in type(module).__name__ for module in model.modules()):
        model.bfloat16()
    batches = [to_device(new_batch(packed, weighted), "cuda") for _ in range(2)]
    try:
        for batch, mode in zip(batches, ("default", "error"), strict=True):
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", torch.bfloat16):
                loss = next_token_loss(model, batch)
            (loss / 7).backward()
            to_device(new_batch(packed, weighted), "cuda")  # the next one
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(loss.detach()) > 0
