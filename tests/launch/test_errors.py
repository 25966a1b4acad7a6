"""Bad input through the scripts themselves: one sentence for each mistake, all of them at once, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_llm.backend.zero import build_deepspeed_plugin, deepspeed_settings
from accel_llm.config.options import TrainOptions
from accel_llm.data.sources import ALLOWED_SOURCES
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.system.exit import run_script

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.fixture
def told(script, tiny, chats, tmp_path) -> Callable[..., list[str]]:
    """The sentences that sft.py ends with; a later option overrules an earlier one."""
    out = tmp_path / "out"

    def run(*more: object, rows: str | None = None, name: str = "rows.jsonl") -> list[str]:
        files = chats
        if rows is not None:
            files = tmp_path / name
            files.write_text(rows, encoding="utf-8")
        words = ("--model_name_or_path", tiny, "--train_files", files, "--max_length", 128, "--output_dir", out)
        with pytest.raises((ConfigError, DataError)) as error:
            script("sft", *words, "--max_steps", 1, *more)
        assert not out.exists()
        sentences = str(error.value).splitlines()
        assert all(len(sentence) < 600 for sentence in sentences)
        return sentences

    return run


def line(row: object) -> str:
    return json.dumps(row) + "\n"


def test_check_raises_all_problems_or_nothing():
    raise_problems([])
    with pytest.raises(ConfigError) as error:
        raise_problems(["a: wrong.", "b: wrong."])
    assert error.value.problems == ["a: wrong.", "b: wrong."] and str(error.value) == "a: wrong.\nb: wrong."


def test_options_are_told_together(told):
    sentences = told(
        "--lerning_rate", 1, "--lora_dropout", 3, "--max_grad_norm", "much", "--optim", "adam", "--seed", -1
    )
    assert sorted(sentences) == [
        "lerning_rate: no such option; did you mean learning_rate?",
        "lora_dropout: '3' is not allowed; give a number of at least 0 and below 1.",
        "max_grad_norm: 'much' is not allowed; give a number of at least 0.",
        "optim: 'adam' is not allowed; give adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, lion, adafactor, sgd or "
        "muon.",
        "seed: '-1' is not allowed; give a whole number of at least 0 and below 4294967296.",
    ]


def test_an_option_of_another_method_is_an_error(told):
    assert told("--method", "full", "--lora_r", 8) == [
        "lora_r: only method lora or qlora uses it, but method is full; remove it."
    ]
    assert told("--method", "qlora", "--load_in_8bit") == [
        "load_in_8bit: only method lora uses it, but method is qlora; remove it."
    ]


def test_missing_model_files_and_clashing_options_are_told_together(told, tmp_path):
    sentences = told(
        *("--model_name_or_path", tmp_path / "nowhere", "--train_files", tmp_path / "a.jsonl", tmp_path),
        *("--eval_files", tmp_path / "b.jsonl", "--attn_implementation", "eager"),
    )
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "attn_implementation",
        "model_name_or_path",
        "train_files",
        "train_files",
        "eval_files",
    ]
    assert sentences[1].startswith(f"model_name_or_path: {tmp_path / 'nowhere'} does not exist; ")
    assert sentences[2] == f"train_files: {tmp_path / 'a.jsonl'} does not exist; name {ALLOWED_SOURCES}."
    assert sentences[3].startswith(f"train_files: {tmp_path} ")


def test_a_model_without_data_and_data_without_a_model(script, tiny, chats, tmp_path):
    for words, sentence in (
        (("--model_name_or_path", tiny), f"train_files: is missing; name at least one source: {ALLOWED_SOURCES}."),
        (("--train_files", chats), "model_name_or_path: is missing; name a model folder or a hub id."),
    ):
        with pytest.raises(ConfigError) as error:
            script("sft", *words, "--output_dir", tmp_path / "out")
        assert str(error.value) == sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows, name, expected",
    [
        ("", "rows.jsonl", "{file}: the file has no rows."),
        ("\n \n", "rows.jsonl", "{file}: the file has no rows."),
        ("[]", "rows.json", "{file}: the file has no rows."),
        (line(CHAT) + '{"messages": [\n', "rows.jsonl", "{file}, line 2: not JSON ("),
        (line(CHAT) + "\n" + "[1]\n", "rows.jsonl", "{file}, line 3: is a list, must be an object."),
        ('[\n{"a": 1},\n{"b": }\n]', "rows.json", "{file}, line 3: not JSON ("),
        (line(CHAT), "rows.xml", "train_files: {file} "),
        (line(CHAT) + line({"question": "Hi", "reply": "Ho"}), "rows.jsonl", "{file}, row 2: "),
        (line({"messages": [{"role": "wizard", "content": "Hi"}]}), "rows.jsonl", "{file}, row 1: "),
    ],
)
def test_files_and_rows_are_named_with_file_and_line(told, tmp_path, rows, name, expected):
    (sentence,) = told(rows=rows, name=name)
    assert sentence.startswith(expected.format(file=tmp_path / name))
    if "question" in rows:
        assert "question" in sentence and "reply" in sentence and "messages" in sentence and "conversations" in sentence
    if "wizard" in rows:
        assert "wizard" in sentence and "assistant" in sentence


def test_rows_without_anything_to_train(told):
    (sentence,) = told(rows=line({"messages": [{"role": "user", "content": "Hi"}]}) * 3)
    assert "train" in sentence


def test_rows_that_are_too_long_are_told_with_their_lengths(told):
    long = {"messages": [{"role": "user", "content": "x" * 500}, CHAT["messages"][1]]}
    (sentence,) = told(rows=line(CHAT) + line(long))
    assert sentence.startswith("max_lost: 50.0% of the rows ") and "longer than max_length=128" in sentence
    assert sentence.endswith("raise max_length, set overlong: truncate or split, or raise max_lost.")


def test_a_model_that_is_none(told, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    assert told("--model_name_or_path", folder, "--max_length", 300) == [
        "max_length: 300 is beyond the model's 256 positions; set max_length to 256 or less."
    ]
    (folder / "adapter_config.json").write_text("{}")
    assert told("--model_name_or_path", folder)[0].startswith(
        f"model_name_or_path: {folder} is an adapter, not a model; merge it first with launch/merge.py --adapter {folder}"
    )
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert told("--model_name_or_path", folder)[0].startswith(f"model_name_or_path: {folder} cannot be loaded (")
    (folder / "config.json").unlink()
    assert "has no config.json" in told("--model_name_or_path", folder)[0]


def test_ids_beyond_the_vocabulary(told, make_model, tmp_path):
    small = make_model(tmp_path / "small", vocab_size=100)
    (sentence,) = told("--model_name_or_path", small)
    assert sentence.startswith("tokenizer_name: the data holds token id ")
    assert sentence.endswith("but the model's vocabulary has 100 rows; use the model's own tokenizer.")


def test_a_tokenizer_without_a_template_is_named_with_the_choices(told, make_model, tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (sentence,) = told("--model_name_or_path", folder)
    assert "chat_template" in sentence and "chatml" in sentence and ".jinja" in sentence


def test_adapter_names_and_quantised_sharding(told, monkeypatch):
    assert told("--lora_target_modules", "nope")[0].startswith("lora_target_modules: the model has no 'nope'; ")
    assert told("--modules_to_save", "nope")[0].startswith("modules_to_save: the model has no 'nope'; ")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert told("--load_in_8bit")[0].startswith("load_in_8bit: fsdp2 cannot shard 8-bit weights")


def test_more_cpu_processes_than_allowed(told, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert told()[0].startswith("num_processes: 9 processes without a GPU, but at most 8 are allowed; ")


def test_a_launch_yaml_that_contradicts_the_recipe(told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert told("--precision", "fp32") == [
        "mixed_precision: the launch YAML says bf16, but the recipe's precision is fp32; remove it there, or set "
        "precision: bf16 in the recipe."
    ]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    fields = [sentence.split(":")[0] for sentence in told()]
    assert fields == ["fsdp_activation_checkpointing", "fsdp_auto_wrap_policy"]


def test_a_deepspeed_configuration_that_contradicts_the_recipe(told, monkeypatch, tmp_path):
    settings = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    settings |= {"train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    sentences = {sentence.split(":")[0]: sentence for sentence in told()}
    fields = {"gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu", "optimizer", "bf16"}
    assert sentences.keys() == fields
    assert sentences["gradient_clipping"].endswith(
        'says 0.5; set it to "auto" there and use max_grad_norm in the recipe.'
    )


def test_what_the_launcher_says_where_an_inline_deepspeed_configuration_is_silent_is_no_contradiction(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,zero_stage,gradient_accumulation_steps")
    assert deepspeed_settings()["gradient_accumulation_steps"] == "auto"
    assert build_deepspeed_plugin(TrainOptions(), 2, cpu=True).gradient_accumulation_steps == 2
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert deepspeed_settings()["gradient_accumulation_steps"] == 4


def test_show_data_needs_a_tokenizer_alone_and_tells_the_same(script, tiny, chats, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in tiny.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, tokenizer)
    script("show_data", "--tokenizer_name", tokenizer, "--train_files", chats, "--max_length", 128, "--json")
    captured = capsys.readouterr()
    rows = [json.loads(row) for row in captured.out.splitlines()]
    assert len(rows) == 24 and rows[0].keys() == {"file", "row", "input_ids", "labels", "text", "trained_text"}
    first = json.loads(chats.read_text(encoding="utf-8").splitlines()[0])["messages"]
    answers = [turn["content"] + "<|im_end|>" for turn in first if turn["role"] == "assistant"]
    assert rows[0]["trained_text"] == "".join(answers) and (rows[0]["file"], rows[0]["row"]) == (str(chats), 1)
    assert rows[0]["text"].startswith(f"<|im_start|>{first[0]['role']}\n{first[0]['content']}<|im_end|>\n")
    script("show_data", "--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128)
    shown = capsys.readouterr().out
    assert first[0]["content"] in shown and "Tokens a row" in shown and "Ledger" in shown

    nowhere = tmp_path / "nowhere.jsonl"
    with pytest.raises(ConfigError) as error:
        script("show_data", "--model_name_or_path", tmp_path / "no", "--train_files", nowhere)
    assert [sentence.split(" ")[0] for sentence in error.value.problems] == ["train_files:", "model_name_or_path:"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not JSON"):
        script("show_data", "--tokenizer_name", tokenizer, "--train_files", broken)


def test_merge_tells_what_is_missing_and_misspelled(script, tmp_path):
    with pytest.raises(ConfigError) as error:
        script("merge", "--adaptor", "x", "--output_dir", tmp_path / "m")
    assert error.value.problems == [
        "adaptor: no such option; did you mean adapter?",
        "adapter: it is required; give one or several texts.",
    ]


def test_a_person_reads_the_sentences_alone_and_the_code_is_2(monkeypatch, capsys):
    def main() -> None:
        raise ConfigError("a: wrong.", "b: wrong.")

    # `run` ends the process itself, past all that still waits.
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out, captured.err) == (2, "", "error: a: wrong.\nerror: b: wrong.\n")


def test_ctrl_c_is_told_without_a_traceback(monkeypatch, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: print(1 / 0))


# One rank of two: it does what it is told after it has said that it is ready.
RANK = """
import os, sys
from accel_llm.errors import ConfigError
from accel_llm.system.exit import run_script
def main():
    print("ready", flush=True)
    what = sys.stdin.readline().strip()
    if what == "bug": 1 / 0
    if what == "mistake": raise ConfigError("a: wrong.", "b: wrong.")
run_script(main)
"""


def ranks(what: list[str], folder: Path) -> tuple[list[str], list[int], float]:
    """Start a process for each of `what` (bug, mistake or nothing) and end all when one has failed, as a launcher does.

    Returns what each said on stderr, the exit codes, and the seconds until the first ended.
    """
    started = []
    for rank in range(len(what)):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(what)),
            "TORCHELASTIC_ERROR_FILE": str(folder / str(rank)),
        }
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen([sys.executable, "-c", RANK], env=os.environ | environment, text=True, **pipes))
    assert [process.stdout.readline() for process in started] == ["ready\n"] * len(what)
    since = time.monotonic()
    for process, word in zip(started, what, strict=True):
        process.stdin.write(f"{word}\n" if word else "")
        process.stdin.flush()
    while not any(process.poll() is not None for process in started):
        time.sleep(0.05)
    seconds = time.monotonic() - since
    for process in started:
        process.terminate()
    said = [process.communicate()[1] for process in started]
    return said, [process.returncode for process in started], seconds


def test_a_bug_that_all_ranks_meet_is_told_by_the_first_alone(tmp_path):
    (first, second), codes, seconds = ranks(["bug", "bug"], tmp_path)
    assert second == "" and codes == [1, -15] and 2.5 < seconds < 30
    assert first.startswith("Traceback (most recent call last):\n") and first.count("ZeroDivisionError") == 1
    assert first.endswith("\nerror (rank 0): ZeroDivisionError: division by zero\n")
    # What torchrun repeats in its last lines.
    assert json.loads((tmp_path / "0").read_text())["message"] == "ZeroDivisionError: division by zero"
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_mistake_that_all_ranks_meet_is_told_at_once_and_by_the_first_alone(tmp_path):
    (first, second), codes, seconds = ranks(["mistake", "mistake"], tmp_path)
    assert (first, second) == ("error: a: wrong.\nerror: b: wrong.\n", "") and codes == [2, -15] and seconds < 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_one_rank_names_it(tmp_path):
    (first, second), codes, _ = ranks(["", "mistake"], tmp_path)
    assert (first, second) == ("", "error (rank 1): a: wrong.\nerror (rank 1): b: wrong.\n") and codes == [-15, 2]


def test_help_prints_nothing_beside_the_help():
    command = [sys.executable, "launch/chat.py", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert ended.returncode == 0 and ended.stderr == "" and "--prompt" in ended.stdout
