"""Secrets in the environment and in URLs do not appear on the screen or in files of a run."""

import json
from typing import Any

import pytest
from rich.console import Console

from accel_llm.config.options import SftOptions
from accel_llm.report import plan_text
from accel_llm.report.page import write_report
from accel_llm.report.plan_text import show_settings
from accel_llm.report.record import recording
from accel_llm.system.secrecy import hide_secrets

KEY = 'a"b<c&d\ne/f+g'  # its spelling differs in JSON, HTML and URLs


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "GOOGLE_APPLICATION_CREDENTIALS", "KEYS"],
)
def test_secrets_of_the_environment_are_hidden_in_every_spelling(monkeypatch, name):
    monkeypatch.setenv(name, KEY)
    assert hide_secrets(f"-{KEY}-{KEY}-") == "-***-***-"
    assert hide_secrets(json.dumps({"a": KEY})) == '{"a": "***"}'
    assert hide_secrets("a&quot;b&lt;c&amp;d\ne/f+g") == "***"
    assert hide_secrets("k:a%22b%3Cc%26d%0Ae%2Ff%2Bg") == "k:***"
    monkeypatch.delenv(name)
    assert hide_secrets(KEY) == KEY


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENIZERS_PARALLELISM", "disabled"), ("KEYBOARD", "qwertyuiop"), ("HF_TOKEN", "true")]
)
def test_other_values_are_not_hidden(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert hide_secrets(f"it is {value}") == f"it is {value}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://me:secret@host/a", "s3://***@host/a"),
        ("clone https://ghp_123@github.com/a/b.git, then", "clone https://***@github.com/a/b.git, then"),
        ("https://h/a?token=x1&b=2", "https://h/a?token=***&b=2"),
        ("https://h/a?b=2&X-Amz-Signature=x1#c", "https://h/a?b=2&X-Amz-Signature=***#c"),
        ("https://h/a?b=2&amp;sig=x1&amp;c=3", "https://h/a?b=2&amp;sig=***&amp;c=3"),
        ('"https://h/a?api_key=x1"', '"https://h/a?api_key=***"'),
        ("X-Goog-Credential in ?X-Goog-Credential=x1%2F2 y", "X-Goog-Credential in ?X-Goog-Credential=*** y"),
        ("https://huggingface.co/a/b?c=d and me@host", "https://huggingface.co/a/b?c=d and me@host"),
        ("<|im_start|>user\nmax_length=4", "<|im_start|>user\nmax_length=4"),
    ],
)
def test_urls_lose_only_their_secrets(text, expected):
    assert hide_secrets(text) == expected
    assert hide_secrets(expected) == expected


def test_the_table_of_settings_and_the_report_show_no_secret(monkeypatch, tmp_path, capsys):
    class Options(SftOptions):
        pass

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setattr(plan_text, "console", Console(width=200, highlight=False))
    values: dict[str, Any] = {
        "run_name": "run of 0123456789abcdef",
        "train_files": ["s3://me:secret@host/a.jsonl"],
        "chat_template_kwargs": {"page": "https://h/?token=x1y2z3"},
    }
    options = Options(model_name_or_path="o/n", **values)
    show_settings(options)
    output = capsys.readouterr().out
    run = {"status": "failed", "error": "OSError: s3://me:secret@host", "options": options.model_dump(mode="json")}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for text in (output, page):
        assert "run of ***" in text and "s3://***@host" in text and "?token=***" in text
        assert not any(secret in text for secret in ("0123456789abcdef", "me:secret", "x1y2z3"))


def test_no_file_of_a_run_contains_a_secret(monkeypatch, tmp_path, tiny, chats, script, capsys):
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("MY_API_KEY", key)
    folder = tmp_path / "run"
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", 1)
    script("sft", *words, "--run_name", f"https://me:{key}@host/x?token=abc1234", "--output_dir", folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "state.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if key.encode() in path.read_bytes() or b"abc1234" in path.read_bytes()]
    assert key not in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["options"]["run_name"] == "https://***@host/x?token=***"
    with pytest.raises(ValueError), recording(folder, True, {}):
        raise ValueError(f"no access with {key}")
    assert json.loads((folder / "run.json").read_text())["error"] == "ValueError: no access with ***"
