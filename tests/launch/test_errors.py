"""Bad input to the scripts: one message for each mistake, all at once, and no files are left."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel_llm.data.sources import ALLOWED_SOURCES
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.system.exit import run_script

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def line(row: object) -> str:
    return json.dumps(row) + "\n"


def test_raise_problems_raises_all_or_nothing():
    raise_problems([])
    with pytest.raises(ConfigError) as error:
        raise_problems(["a: wrong.", "b: wrong."])
    assert error.value.problems == ["a: wrong.", "b: wrong."] and str(error.value) == "a: wrong.\nb: wrong."


def test_bad_options_are_reported_together(sft_errors):
    sentences = sft_errors(
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


def test_an_option_of_another_method_is_an_error(sft_errors):
    assert sft_errors("--method", "full", "--lora_r", 8) == [
        "lora_r: only method lora or qlora uses it, but method is full; remove it."
    ]
    assert sft_errors("--method", "qlora", "--load_in_8bit") == [
        "load_in_8bit: method qlora already holds the base in 4 bits; give one of them."
    ]


def test_missing_model_files_and_clashing_options_are_reported_together(sft_errors, tmp_path):
    sentences = sft_errors(
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
def test_files_and_rows_are_named_with_file_and_line(sft_errors, tmp_path, rows, name, expected):
    (sentence,) = sft_errors(rows=rows, name=name)
    assert sentence.startswith(expected.format(file=tmp_path / name))
    if "question" in rows:
        assert "question" in sentence and "reply" in sentence and "messages" in sentence and "conversations" in sentence
    if "wizard" in rows:
        assert "wizard" in sentence and "assistant" in sentence


def test_rows_without_anything_to_train(sft_errors):
    (sentence,) = sft_errors(rows=line({"messages": [{"role": "user", "content": "Hi"}]}) * 3)
    assert "train" in sentence


def test_rows_that_are_too_long_are_reported_with_their_lengths(sft_errors):
    long = {"messages": [{"role": "user", "content": "x" * 500}, CHAT["messages"][1]]}
    (sentence,) = sft_errors(rows=line(CHAT) + line(long))
    assert sentence.startswith("max_lost: 50.0% of the rows ") and "longer than max_length=128" in sentence
    assert sentence.endswith("raise max_length, set overlong: truncate or split, or raise max_lost.")


def test_unusable_models(sft_errors, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    assert sft_errors("--model_name_or_path", folder, "--max_length", 300) == [
        "max_length: 300 is beyond the model's 256 positions; set max_length to 256 or less."
    ]
    (folder / "adapter_config.json").write_text("{}")
    assert sft_errors("--model_name_or_path", folder)[0].startswith(
        f"model_name_or_path: {folder} is an adapter, not a model; merge it first with `python "
    )
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert sft_errors("--model_name_or_path", folder)[0].startswith(f"model_name_or_path: {folder} cannot be loaded (")
    (folder / "config.json").unlink()
    assert "has no config.json" in sft_errors("--model_name_or_path", folder)[0]


def test_ids_beyond_the_vocabulary(sft_errors, make_model, tmp_path):
    small = make_model(tmp_path / "small", vocab_size=100)
    (sentence,) = sft_errors("--model_name_or_path", small)
    assert sentence.startswith("tokenizer_name: the data holds token id ")
    assert sentence.endswith("but the model's vocabulary has 100 rows; use the model's own tokenizer.")


def test_a_tokenizer_without_a_template_is_named_with_the_choices(sft_errors, make_model, tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (sentence,) = sft_errors("--model_name_or_path", folder)
    assert "chat_template" in sentence and "chatml" in sentence and ".jinja" in sentence


def test_adapter_names_and_quantized_sharding(sft_errors, monkeypatch):
    assert sft_errors("--lora_target_modules", "nope")[0].startswith("lora_target_modules: the model has no 'nope'; ")
    assert sft_errors("--modules_to_save", "nope")[0].startswith("modules_to_save: the model has no 'nope'; ")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sft_errors("--load_in_8bit")[0].startswith("load_in_8bit: fsdp2 cannot shard 8-bit weights")


def test_show_data_needs_only_a_tokenizer_and_shows_the_same_rows(script, tiny, chats, tmp_path, capsys):
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
    output = capsys.readouterr().out
    assert first[0]["content"] in output and "Tokens a row" in output and "Ledger" in output

    nowhere = tmp_path / "nowhere.jsonl"
    with pytest.raises(ConfigError) as error:
        script("show_data", "--model_name_or_path", tmp_path / "no", "--train_files", nowhere)
    assert [sentence.split(" ")[0] for sentence in error.value.problems] == ["train_files:", "model_name_or_path:"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not JSON"):
        script("show_data", "--tokenizer_name", tokenizer, "--train_files", broken)


def test_merge_reports_missing_and_misspelled_options(script, tmp_path):
    with pytest.raises(ConfigError) as error:
        script("merge", "--adaptor", "x", "--output_dir", tmp_path / "m")
    assert error.value.problems == [
        "adaptor: no such option; did you mean adapter?",
        "adapter: it is required; give one or several texts.",
    ]


def test_errors_are_printed_without_traceback_and_the_code_is_2(monkeypatch, capsys):
    def main() -> None:
        raise ConfigError("a: wrong.", "b: wrong.")

    # `run_script` ends with os._exit, without waiting for threads.
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out, captured.err) == (2, "", "error: a: wrong.\nerror: b: wrong.\n")


def test_ctrl_c_is_reported_without_a_traceback(monkeypatch, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: print(1 / 0))


# The program of one rank: it prints "ready", reads a word and fails as the word says.
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


def run_ranks(what: list[str], folder: Path) -> tuple[list[str], list[int], float]:
    """Start a process for each of `what` (bug, mistake or nothing). When one fails, end all, as a launcher does.

    Returns the stderr of each, the exit codes, and the seconds until the first ended.
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
    errors = [process.communicate()[1] for process in started]
    return errors, [process.returncode for process in started], seconds


def test_a_bug_on_all_ranks_is_reported_by_the_first_alone(tmp_path):
    (first, second), codes, seconds = run_ranks(["bug", "bug"], tmp_path)
    assert second == "" and codes == [1, -15] and 2.5 < seconds < 30
    assert first.startswith("Traceback (most recent call last):\n") and first.count("ZeroDivisionError") == 1
    assert first.endswith("\nerror (rank 0): ZeroDivisionError: division by zero\n")
    # torchrun repeats this message in its last lines.
    assert json.loads((tmp_path / "0").read_text())["message"] == "ZeroDivisionError: division by zero"
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_mistake_on_all_ranks_is_reported_at_once_by_the_first_alone(tmp_path):
    (first, second), codes, seconds = run_ranks(["mistake", "mistake"], tmp_path)
    assert (first, second) == ("error: a: wrong.\nerror: b: wrong.\n", "") and codes == [2, -15] and seconds < 2
    assert json.loads((tmp_path / "0").read_text())["message"] == "a: wrong.\nb: wrong."
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_mistake_of_one_rank_names_it(tmp_path):
    (first, second), codes, _ = run_ranks(["", "mistake"], tmp_path)
    assert (first, second) == ("", "error (rank 1): a: wrong.\nerror (rank 1): b: wrong.\n") and codes == [-15, 2]


def test_help_prints_nothing_beside_the_help():
    command = [sys.executable, "launch/chat.py", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert ended.returncode == 0 and ended.stderr == "" and "--prompt" in ended.stdout
