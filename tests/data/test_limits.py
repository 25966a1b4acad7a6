"""A run that would lose too much stops, and its sentence names the cause and a setting that cures it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import CONTROL_TOKENS, byte_level

from accel_llm.chat.template import load_template
from accel_llm.config.data_options import DataOptions
from accel_llm.data.ledger import Ledger
from accel_llm.data.limits import describe_losses
from accel_llm.data.prepare import EncodedData, encode_conversations
from accel_llm.errors import ConfigError

TEMPLATES = Path(__file__).parents[1] / "templates"
MORE_TOKENS = ["<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"]  # Gemma 4
MORE_TOKENS += [f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "end\u2581of\u2581sentence")]  # DeepSeek
PLAIN = [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4")]
TOOL = {"name": "look", "description": "Looks at the sky.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


def chat(turns: list[tuple[str, str]] = PLAIN, thought: str = "") -> dict[str, Any]:
    more = {"reasoning_content": thought} if thought else {}
    messages = [{"role": role, "content": text, **(more if role == "assistant" else {})} for role, text in turns]
    return {"messages": messages}


def with_tools() -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Is it blue?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "very"},
        {"role": "assistant", "content": "Yes."},
    ]
    return {"messages": messages, "tools": [TOOL]}


def encode(folder: Path, template: str, rows: list[dict[str, Any]], **options: Any) -> EncodedData:
    tokenizer = byte_level([*CONTROL_TOKENS["qwen2.5"], *MORE_TOKENS])
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = DataOptions(train_files=[str(file)], cache_dir=str(folder / "cache"), **options)
    bound = load_template(tokenizer, str(TEMPLATES / f"{template}.jinja"), values.chat_template_kwargs)
    return encode_conversations(values, 0, tokenizer, bound)


# template, rows -> what the sentence advises, and the options that it names.
ADVICE = {
    "reasoning that history drops": (
        "qwen3",
        [chat(thought="Hm.")],
        "split_turns: auto or open_thought: history",
        {"split_turns": "auto"},
    ),
    "answers without the thought that the prompt opens": (
        "nemotron-3",
        [chat()],
        "open_thought: close or open_thought: history or chat_template_kwargs: enable_thinking=false",
        {"open_thought": "close"},
    ),
    "the family has a prompt without a thought": (
        "nemotron-3",
        [chat()],
        "open_thought: close or open_thought: history or chat_template_kwargs: enable_thinking=false",
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "reasoning after a prompt without a thought": (
        "nemotron-3",
        [chat(PLAIN[:2], "Hm.") | {"chat_template_kwargs": {"enable_thinking": False}}],
        "chat_template_kwargs: enable_thinking=true",
        {},
    ),
    "no other prompt": (
        "deepseek-r1-distill",
        [chat(PLAIN[:2])],
        "open_thought: close or open_thought: history",
        {"open_thought": "history"},
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_cures(case: str, tmp_path: Path) -> None:
    template, rows, advice, options = ADVICE[case]
    with pytest.raises(ConfigError) as error:
        encode(tmp_path, template, rows)
    assert f"set {advice}, or raise max_lost." in str(error.value)
    if "split_turns" not in options:
        assert "split_turns" not in str(error.value)  # offered only where it helps
    if not options:  # the row itself sets the variable that the sentence names
        rows = [{"messages": row["messages"]} for row in rows]
    data = encode(tmp_path, template, rows, **options)
    assert data.ledger.turns == {} and data.ledger.lost_share() == (0, 0)


def test_a_setting_that_helps_some_rows_is_named_with_its_count(tmp_path: Path) -> None:
    rows = [chat(thought="Hm."), chat()]
    with pytest.raises(ConfigError, match=r"set split_turns: auto \(helps 1 of 2\) or open_thought: close"):
        encode(tmp_path, "nemotron-3", rows)


@pytest.mark.parametrize(("template", "kinds"), [("chatml", "descriptions of tools"), ("qwen2.5", "")])
def test_a_template_that_drops_tools_stops_the_run(template: str, kinds: str, tmp_path: Path) -> None:
    rows = [with_tools(), chat()]
    if not kinds:
        assert encode(tmp_path, template, rows).ledger.left_out == {}
        return
    with pytest.raises(ConfigError) as error:
        encode(tmp_path, template, rows, max_lost=0.3)
    assert f"{kinds} (in 1 of 2 rows)" in str(error.value)
    ledger = encode(tmp_path, template, rows, max_lost=1).ledger
    assert ledger.left_out[kinds] == 1


def test_a_description_alone_that_is_dropped_stops_the_run(tmp_path: Path) -> None:
    source = (TEMPLATES / "qwen2.5.jinja").read_text(encoding="utf-8")
    assert "tojson" in source
    changed = source.replace("tool | tojson", "tool.function.name")
    assert changed != source
    (tmp_path / "changed.jinja").write_text(changed, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        encode(tmp_path, str(tmp_path / "changed"), [with_tools()])
    assert str(error.value) == (
        "chat_template: the template does not write everything that the rows say; missing are descriptions of tools (in "
        "1 of 1 rows); allowed is 1.0% of the rows; use a template that writes them, or raise max_lost."
    )


def test_losses_are_described_with_counts_and_an_example() -> None:
    ledger = Ledger()
    assert describe_losses(ledger) == "nothing was read"
    for source in ("a", "b"):
        ledger.count(source, "dropped: empty answer", 700)
    ledger.count("a", "dropped: nothing to train")
    ledger.count("a", "cut: too long", 0, 5)
    assert describe_losses(ledger) == "dropped: empty answer (1,400 rows), dropped: nothing to train (1 row)"
    ledger.example("empty answer", "a.jsonl, row 3: it is empty")
    assert describe_losses(ledger).endswith("(1 row); for example a.jsonl, row 3: it is empty")
