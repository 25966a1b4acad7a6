"""Parts of a model and fused experts on every backend: the gradient of one step equals that of float64.

    python tests/proofs/parts.py --work W
    python tests/proofs/parts.py --work W --only 'experts-*'

Freeze and bitfit train weights of the base; `target_parameters` a LoRA of the experts of a mixture, which are one
parameter in each layer. A cell is one step of plain gradient descent by two processes with accumulation, from
launch/sft.py; the change of a weight divided by the learning rate is its gradient. Rows have uneven lengths.
"""

import argparse
import fnmatch
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import backends
import float64
import matrix
import numpy as np
from forks import Ended, Run, compute, execute, warm
from safetensors.numpy import load_file, save_file

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
FREEZE = "--method freeze --method_options"
# Norms of Llama have no biases, those of GPT-2 have; torch computes them in one dtype.
CASES = {
    "layers": ("model", f"{FREEZE} layers=1 norms=true"),
    "embeddings": ("model", f"{FREEZE} embeddings=true"),
    "bitfit": ("biased", "--method bitfit"),
    "norms": ("gpt2", "--method bitfit"),
    "experts": ("mixture", "--method lora --adapter_name_or_path {work}/experts"),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def prepare(work: Path) -> None:
    """Write the models, the rows, an adapter of the experts, and the step of each case in float64."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen3MoeConfig

    backends.prepare(work)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    sizes = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    width = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    mixture = Qwen3MoeConfig(**sizes, **width, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    gpt2 = GPT2Config(**sizes, n_embd=64, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    for name, config in (("mixture", mixture), ("gpt2", gpt2)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    base: Any = AutoModelForCausalLM.from_pretrained(work / "mixture")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(work / "experts")
    for case in CASES:
        write_step(case, work)


def write_step(case: str, work: Path) -> None:
    """Write all weights that can have a gradient, before the step, and their clipped gradients."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from accel_llm.adapters.partial import parameters_of_part
    from accel_llm.config.options import MethodOptions
    from accel_llm.demo.tokenizer import build_demo_tokenizer

    name, words = CASES[case]
    lines = (work / "sft.jsonl").read_text("utf-8").splitlines()[: matrix.ROWS]
    rows = [matrix.chat(build_demo_tokenizer(), json.loads(line)) for line in lines]
    model: Any = AutoModelForCausalLM.from_pretrained(work / name)
    if name == "mixture":
        model.set_experts_implementation("eager")  # torch's product of groups does not take float64
    if case == "experts":
        model = PeftModel.from_pretrained(model, work / "experts", is_trainable=True)
    else:
        chosen = {key: json.loads(value) for key, _, value in (word.partition("=") for word in words.split()[3:])}
        names = parameters_of_part(model, MethodOptions(method=words.split()[1], method_options=chosen))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in names)
    float64.mean_loss(model.double().train(), rows).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    torch.nn.utils.clip_grad_norm_(trained.values(), matrix.MAX_NORM)
    save_file(
        {f"gradient {key}": np.array(p.grad) for key, p in trained.items()}
        | {f"start {key}": np.array(p.detach()) for key, p in trained.items()},
        work / f"{case}-step.safetensors",
    )


def build_run(case: str, strategy: str, work: Path) -> Run:
    name, words = CASES[case]
    output = work / "runs" / f"{case}-{strategy}"
    where = ["--model_name_or_path", work / name, "--train_files", work / "sft.jsonl", "--output_dir", output]
    where += ["--cache_dir", work / "cache", "--precision", "fp32", "--max_length", 80, "--packing", "false"]
    where += ["--per_device_train_batch_size", matrix.ROWS // 4, "--eval_generate", 0]
    where += [*backends.GRADIENT.split(), *words.format(work=work).split()]
    return Run(output.name, "sft", strategy, 2, [str(word) for word in where], output)


def judge(case: str, end: Ended, work: Path) -> str:
    """Return the largest relative error of a gradient, the sentence of a refusal, or the reason of a failure."""
    if end.code:
        return f"{'refused' if end.code == 2 else 'failed'}: {' '.join(end.sentences) or end.cause}"
    expected = load_file(work / f"{case}-step.safetensors")
    try:
        error = backends.largest_gradient_error(expected, backends.checkpointed(end.run.output))
    except AssertionError as difference:
        return f"failed: {difference}"
    return f"{'same' if error <= matrix.GRADIENT_TOLERANCE else 'different'}: {error:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERNS", default="*", help="cells whose name fits, such as experts-zero3")
    parser.add_argument("--work", type=Path, help="folder to work in")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="parts-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    if not (work / "experts-step.safetensors").exists():
        compute(partial(prepare, work), work / "prepare.log")
    cells = [(case, strategy) for case in CASES for strategy in STRATEGIES]
    patterns = args.only.split(",")
    cases = {
        f"{case}-{strategy}": case
        for case, strategy in cells
        if any(fnmatch.fnmatch(f"{case}-{strategy}", pattern) for pattern in patterns)
    }
    runs = [build_run(case, name.removeprefix(f"{case}-"), work) for name, case in cases.items()]
    for end in execute(runs, work):
        print(end.run.name, judge(cases[end.run.name], end, work), flush=True)


if __name__ == "__main__":
    main()
