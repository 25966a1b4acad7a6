"""Real launches of the scripts: every strategy, two processes on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer

ROOT = Path(__file__).parents[2]
# tests/proofs/matrix.py runs every pair of strategy and method, as forks that train as a launch does to the last bit.
LAUNCHED = [
    pytest.param("full", "ddp", marks=pytest.mark.long),
    ("lora", "zero2"),
    pytest.param("lora", "fsdp2", marks=pytest.mark.long),
    pytest.param("lora", "zero3", marks=pytest.mark.long),
]
STEPS = 6


def launch(*words: str, code: int = 0, **environment: str) -> str:
    """Run a command line in the repository; return its combined output."""
    command = [sys.executable, *words] if words[0].endswith(".py") else list(words)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (process.returncode == 0) == (code == 0), process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout + process.stderr


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny random model, and a ZeRO-3 config that shards even its small tensors."""
    folder = tmp_path_factory.mktemp("launch")
    tokenizer = build_demo_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = demo_conversations("train")[:400]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = json.loads((ROOT / "accelerate_configs" / "zero3.json").read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(settings), encoding="utf-8")
    config = (ROOT / "accelerate_configs" / "zero3.yaml").read_text(encoding="utf-8")
    (folder / "zero3.yaml").write_text(config.replace("accelerate_configs/zero3.json", str(folder / "zero3.json")))
    return folder


def words(work: Path, method: str, output: Path) -> list[str]:
    return [
        *["--model_name_or_path", str(work / "model"), "--train_files", str(work / "rows.jsonl"), "--method", method],
        *["--max_length", "128", "--total_batch_size", "8", "--per_device_train_batch_size", "2"],
        *["--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "3e-3", "--output_dir", str(output)],
    ]


def train(work: Path, strategy: str, method: str) -> Path:
    config = work / "zero3.yaml" if strategy == "zero3" else ROOT / "accelerate_configs" / f"{strategy}.yaml"
    output = work / f"{strategy}-{method}"
    started = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2", "launch/sft.py"]
    screen = launch(*started, *words(work, method, output))
    assert " warns: " not in screen, screen
    return output


@pytest.fixture
def reference(request: pytest.FixtureRequest, work: Path, script: Callable[..., None]) -> tuple[str, Path]:
    """Train the same in this process, once for each method."""
    output = work / f"alone-{request.param}"
    if not output.exists():
        script("sft", *words(work, request.param, output))
    return request.param, output


@pytest.mark.parametrize("reference, strategy", LAUNCHED, indirect=["reference"])
def test_every_strategy_gives_the_single_process_run(strategy: str, reference: tuple[str, Path], work: Path) -> None:
    method, alone = reference
    output = train(work, strategy, method)
    for ours, theirs in zip(metrics(output), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6 if ours["step"] == 1 else 1e-3)
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["supervised_tokens"] == theirs["supervised_tokens"]
    weights = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    ours, theirs = load_file(output / weights), load_file(alone / weights)
    assert ours.keys() == theirs.keys()
    moved = load_file(work / "model" / "model.safetensors") if method == "full" else {}
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
        assert name not in moved or not torch.equal(moved[name], tensor), f"{name} was not trained"

    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    force = run["accelerate"]
    assert run["status"] == "done" and force["num_processes"] == 2 and force["strategy"] == strategy
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert force["distributed_type"] == kinds.get(strategy, "DEEPSPEED")
    held, total = force["parameters"]["this_process"], force["parameters"]["total"]
    assert held == pytest.approx(total / 2, rel=0.02) if strategy in ("zero3", "fsdp2") else held == total
    if strategy == "zero2":
        settings = force["deepspeed"]["zero_optimization"]
        assert settings["stage"] == 2 and settings["overlap_comm"] is False
        # zero2.json says 2e8, but a bucket is no larger than what is trained.
        assert settings["reduce_bucket_size"] == force["parameters"]["trainable"] < 200_000_000


@pytest.mark.long
def test_the_demo_trains_with_qlora(tmp_path: Path) -> None:
    settings = [
        "--method",
        "qlora",
        "--max_steps",
        "3",
        "--eval_steps",
        "1",
        "--limit_rows",
        "400",
        "--eval_generate",
        "4",
    ]
    screen = launch(
        *["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "launch/sft.py", *settings],
        *["--output_dir", str(tmp_path)],
    )
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["status"] == "done"
    assert " warns: " not in screen and "gemm_4bit" not in screen
    losses = [line["eval/loss"] for line in metrics(tmp_path) if "eval/loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.long
def test_gradients_equal_a_float64_reference_over_two_processes(tmp_path: Path) -> None:
    output = launch(
        *["accelerate", "launch", "--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2"],
        *["tests/proofs/gradients.py", str(tmp_path / "gradients.json")],
    )
    worst = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))
    assert len(worst) == 13, output
    control = worst.pop("32x1 packed, averaging left in")
    assert control > 0.1, "the comparison would not notice a wrong scale"
    assert max(worst.values()) < 1e-5, worst


SCORE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(line)["messages"] for line in open(sys.argv[2])][: int(sys.argv[3])]
right = 0
for messages in rows:
    ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1]:]
    right += tokenizer.decode(out) == messages[-1]["content"] + "<|im_end|>"
print("score", right / len(rows))
"""


@pytest.mark.long  # .ci/run trains the demo first of all
def test_the_demo_learns_exports_merges_and_answers(tmp_path: Path) -> None:
    output, merged = tmp_path / "demo", tmp_path / "merged"
    screen = launch(
        *["accelerate", "launch", "--config_file", "accelerate_configs/zero2.yaml", "launch/sft.py"],
        *["--output_dir", str(output)],
    )
    scores = [line["eval/exact_match"] for line in metrics(output) if "eval/exact_match" in line]
    assert scores[0] <= 0.1 and scores[-1] >= 0.9
    assert "stop token" in screen and "launch/merge.py" in screen

    assert "verified" in launch("launch/merge.py", "--adapter", str(output), "--output_dir", str(merged))
    options = json.loads((output / "run.json").read_text(encoding="utf-8"))["options"]
    (tmp_path / "score.py").write_text(SCORE)
    plain = launch(str(tmp_path / "score.py"), str(merged), options["eval_files"][0], str(options["eval_generate"]))
    assert float(plain.split("score ")[1].split()[0]) == pytest.approx(scores[-1], abs=1e-9)


@pytest.mark.long
def test_bad_input_is_one_sentence_from_one_process(tmp_path: Path) -> None:
    output = tmp_path / "never"
    screen = launch(
        *[
            "accelerate",
            "launch",
            "--config_file",
            "accelerate_configs/ddp.yaml",
            "--num_processes",
            "2",
            "launch/sft.py",
        ],
        *["--model_name_or_path", str(tmp_path), "--train_files", str(tmp_path / "absent.jsonl")],
        *["--output_dir", str(output)],
        code=1,
    )
    # At once, and again below the lines of the launcher.
    assert screen.count("error: model_name_or_path") == 2 and screen.count("error: train_files") == 2
    assert "error (rank" not in screen and 'File "' not in screen.split("error: train_files")[0]
    assert 'File "' not in screen.rpartition("error: model_name_or_path")[2]
    assert not output.exists()


def test_the_exit_code_of_a_mistake_is_2() -> None:
    process = subprocess.run(
        [sys.executable, "launch/sft.py", "--lerning_rate", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.strip() == "error: lerning_rate: no such option; did you mean learning_rate?"
    assert process.stdout == ""
