"""Templates whose prompt opens or closes a thought, and which option trains which chats. ⟦ and ⟧ enclose what is trained.

A template trains a chat if it loses no turn, and no reasoning that it writes. What must be trained under which option
stands in tables written by hand.
"""

# ruff: noqa: RUF001 (DeepSeek's control tokens are written with a fullwidth bar)
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families import FAMILIES, TEMPLATES, load
from specification import MULTI, SHAPES, Chat, Family, Tools, assistant, bare, byte_level, mark_trained, mutations
from specification import system as system_message
from specification import user as question
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.targets import CLOSED_THOUGHT, NO_CALL, NO_THOUGHT, NOT_AFTER_PROMPT, REWRITTEN
from accel_llm.chat.template import EncodedConversation, Template, load_template

# ---- which option each template needs

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "split_turns": {"split_turns": "auto"},
    "close": {"open_thought": "close"},
    "history": {"open_thought": "history"},
}
# Whether the template is told to think, under the name that it reads.
VARIABLES = {"think": True, "do not think": False}

# The templates that write reasoning. Others train every answer without it.
WRITE_REASONING = {
    *("qwen3", "qwen3-thinking-2507", "qwen3.5", "deepseek-r1", "deepseek-r1-distill", "deepseek-r1-thinking"),
    *("deepseek-v3.1", "deepseek-v3.2", "gemma-4", "glm-4.5", "gpt-oss", "nemotron-3"),
}
# Not accepted: one refuses a system message, one forgets it once its question is answered, one writes it last.
WITHOUT_SYSTEM = {"gemma-2", "mistral-v3", "nasty-system-last"}
# They refuse tool calls, or write none: no option can train them. SmolLM3 lists the tools, but writes no calls.
WITHOUT_CALLS = {
    *("chatml", "chatml-generation", "command-r", "deepseek-r1", "deepseek-r1-thinking", "gemma-2", "gemma-3"),
    *("internlm2", "nasty-collapsing", "nasty-open", "nasty-system-last", "olmo-2", "phi-3.5", "phi-4", "smollm3"),
    *("yi", "zephyr"),
}
# Every option that suffices, where some option is needed: one of them is enough.
NEEDED: dict[tuple[str, str], set[str]] = {
    ("deepseek-r1", "plain"): {"close", "history"},
    ("deepseek-r1-distill", "plain"): {"close", "history"},
    ("nemotron-3", "plain"): {"close", "history", "do not think"},
    # Reasoning of earlier turns is dropped from history, so these turns need rows of their own.
    ("qwen3", "reasoning"): {"split_turns"},
    ("qwen3-thinking-2507", "reasoning"): {"split_turns"},
    ("qwen3.5", "reasoning"): {"split_turns"},
    ("deepseek-r1", "reasoning"): {"split_turns"},
    ("deepseek-r1-distill", "reasoning"): {"split_turns"},
    ("deepseek-r1-thinking", "reasoning"): {"split_turns"},
    ("glm-4.5", "reasoning"): {"split_turns"},
    ("gpt-oss", "reasoning"): {"split_turns"},
    ("nemotron-3", "reasoning"): {"split_turns"},
    ("gemma-4", "reasoning"): {"split_turns"},
    ("deepseek-v3.2", "reasoning"): {"split_turns"},
    # Only its prompt opens a thought: the template itself writes none, so nothing sets this variable by itself.
    ("deepseek-v3.1", "one answer with reasoning"): {"think"},
    ("deepseek-r1-distill", "tools"): {"close", "history"},
    ("nemotron-3", "tools"): {"close", "history", "do not think"},
}
# Several turns with reasoning need two options: `thinking` and `split_turns`.
TWO_OPTIONS = {("deepseek-v3.1", "reasoning"): ("think", "split_turns")}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"left": {"type": "integer", "description": "The first one."}},
            "required": ["left"],
        },
    },
}


def talk(turns: int, reasoning: bool = False) -> Chat:
    chat: Chat = []
    for number in range(turns):
        thought = {"reasoning_content": f"Thought {number}."} if reasoning else {}
        chat += [question(f"Question {number}?"), assistant(f"Answer {number}.", **thought)]
    return chat


def tool_talk(name: str) -> Chat:
    # Kimi K2 writes the id alone, which its own calls begin with the name; Mistral wants nine letters and digits.
    identity = "functions.add:0" if name == "kimi-k2" else "call00001"
    call = {"id": identity, "type": "function", "function": {"name": "add", "arguments": {"left": 2}}}
    result = {"role": "tool", "name": "add", "tool_call_id": identity, "content": "The sum is 4."}
    return [question("2+2?"), assistant("", tool_calls=[call]), result, assistant("Four.")]


def chats(name: str, kind: str) -> list[tuple[Chat, Tools]]:
    if kind == "tools":
        return [(tool_talk(name), [TOOL])]
    if kind == "one answer with reasoning":
        return [(talk(1, True), None)]
    if kind == "reasoning":
        return [(talk(1, True), None), (talk(3, True), None)]
    plain = [talk(1), talk(3)]
    if name not in WITHOUT_SYSTEM:
        plain += [[system_message("Be brief."), *chat] for chat in plain]
    return [(chat, None) for chat in plain]


@lru_cache
def load_with(name: str, option: str) -> Template | None:
    """Return the template under an option; None if it knows no such option."""
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    if option not in VARIABLES:
        return load(name)[1]
    variable = "enable_thinking" if "enable_thinking" in source else "thinking"
    if f"{variable} is" not in source and f"{variable} |" not in source and f"if {variable}" not in source:
        return None
    return load_template(load(name)[0], str(TEMPLATES / f"{name}.jinja"), {variable: VARIABLES[option]})


def encode(name: str, option: str, chat: Chat, tools: Tools = None, second: str = "none") -> EncodedConversation | None:
    template = load_with(name, option)
    return template.encode(chat, tools=tools, **OPTIONS.get(option, {}), **OPTIONS[second]) if template else None


def suffices(name: str, kind: str, option: str, second: str = "none") -> bool:
    for chat, tools in chats(name, kind):
        encoding = encode(name, option, chat, tools, second)
        if encoding is None or encoding.lost:
            return False
        assert encoding.rows and all(any(label != -100 for label in row.labels) for row in encoding.rows)
        if kind != "plain" and name in WRITE_REASONING and encoding.without_reasoning:
            return False
    return True


def sufficient(name: str, kind: str) -> set[str]:
    """Return the options that train these chats; only "none" if nothing needs to be set."""
    if suffices(name, kind, "none"):
        return {"none"}
    return {option for option in [*OPTIONS, *VARIABLES] if suffices(name, kind, option)}


CASES = [(name, kind) for kind in ("plain", "one answer with reasoning", "reasoning") for name in FAMILIES]
CASES += [(name, "tools") for name in FAMILIES if name not in WITHOUT_CALLS]


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case not in TWO_OPTIONS])
def test_every_template_trains_every_chat_by_at_most_one_option(name: str, kind: str) -> None:
    options = sufficient(name, kind)
    assert options
    assert options == NEEDED.get((name, kind), {"none"})


@pytest.mark.parametrize(("name", "kind"), TWO_OPTIONS)
def test_chats_that_need_two_options(name: str, kind: str) -> None:
    assert not sufficient(name, kind)
    assert suffices(name, kind, *TWO_OPTIONS[name, kind])


def test_the_tables_are_about_cases() -> None:
    assert {*NEEDED, *TWO_OPTIONS} <= set(CASES)


def test_a_wrong_table_is_noticed() -> None:
    assert sufficient("nemotron-3", "plain") != {"none"}
    assert sufficient("chatml", "plain") != {"close"}
    assert sufficient("deepseek-r1-distill", "plain") != {"split_turns"}
    assert not suffices("qwen3", "reasoning", "history")  # loses no turn, but the reasoning


@pytest.mark.parametrize("name", FAMILIES)
def test_which_templates_write_reasoning_and_calls(name: str) -> None:
    chat = talk(1, True)
    encoding = encode(name, "think", chat) or encode(name, "none", chat)
    assert encoding is not None
    assert encoding.without_reasoning == (0 if name in WRITE_REASONING else 1)
    (text,) = [mark_trained(load(name)[0], row) for row in encoding.rows]
    assert ("Thought 0." in text.partition("⟦")[2]) == (name in WRITE_REASONING)
    if name in WITHOUT_CALLS - {"command-r", "gemma-2", "gemma-3"}:  # these three refuse them
        assert NO_CALL in load(name)[1].encode(tool_talk(name), tools=[TOOL], open_thought="close").lost


# ---- exact texts

R1_QUESTION = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
R1_END = "<｜end▁of▁sentence｜>"
NEMOTRON_QUESTION = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
NEXT = "\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
QWEN_QUESTION = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
GEMMA_REASONING = [
    "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n"
    "<|turn>user\n2+2?<turn|>\n<|turn>model\n⟦<|channel>thought\nSum.\n<channel|>4.<turn|>⟧\n",
    "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    "⟦<|channel>thought\nPolite.\n<channel|>Hello.<turn|>⟧\n",
]


class Expected(NamedTuple):
    """The marked rows of a chat, and how its turns were counted."""

    rows: list[str]
    lost: dict[str, int] = {}  # noqa: RUF012
    shown_as_history: int = 0
    closed_thoughts: int = 0
    without_reasoning: int = 0


# (template, variables, shape, options) -> what is trained
EXPECTED: list[tuple[str, dict[str, bool], str, dict[str, Any], Expected]] = [
    ("deepseek-r1-distill", {}, "multi", {}, Expected([], {NO_THOUGHT: 2})),
    (
        "deepseek-r1-distill",
        {},
        "multi",
        {"open_thought": "close"},
        Expected(
            [
                f"{R1_QUESTION}⟦Hello.{R1_END}⟧<｜User｜>2+2?<｜Assistant｜><think>\n⟦\n</think>\n\n4.\n\nSure.{R1_END}⟧",
            ],
            shown_as_history=1,
            closed_thoughts=1,
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "multi",
        {"open_thought": "close", "split_turns": True},
        Expected(
            [
                f"{R1_QUESTION}Hello.{R1_END}<｜User｜>2+2?<｜Assistant｜><think>\n⟦\n</think>\n\n4.\n\nSure.{R1_END}⟧",
                f"{R1_QUESTION}<think>\n⟦\n</think>\n\nHello.{R1_END}⟧",
            ],
            closed_thoughts=2,
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "multi",
        {"open_thought": "history"},
        Expected(
            [f"{R1_QUESTION}⟦Hello.{R1_END}⟧<｜User｜>2+2?<｜Assistant｜>⟦4.\n\nSure.{R1_END}⟧"], shown_as_history=2
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "reasoning",
        {"split_turns": "auto"},
        Expected(
            [
                f"{R1_QUESTION}Hello.{R1_END}<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.{R1_END}⟧",
                f"{R1_QUESTION}<think>\n⟦Polite.\n</think>\n\nHello.{R1_END}⟧",
            ]
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "reasoning",
        {"open_thought": "history"},
        Expected(
            [f"{R1_QUESTION}⟦Hello.{R1_END}⟧<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.{R1_END}⟧"],
            shown_as_history=1,
            without_reasoning=1,
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "tools",
        {"open_thought": "close"},
        Expected(
            [
                "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
                '<｜tool▁sep｜>add\n```json\n{"a": 2, "b": 2}\n```<｜tool▁call▁end｜>⟧<｜tool▁outputs▁begin｜>'
                f"<｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦Four.{R1_END}⟧"
            ],
            shown_as_history=1,
        ),
    ),
    (
        "deepseek-v3.1",
        {},
        "reasoning",
        {},
        Expected(
            [f"{R1_QUESTION}</think>⟦Hello.{R1_END}⟧<｜User｜>2+2?<｜Assistant｜></think>⟦4.{R1_END}⟧"],
            without_reasoning=2,
        ),
    ),
    (
        "deepseek-v3.1",
        {"thinking": True},
        "reasoning",
        {"split_turns": "auto"},
        Expected(
            [
                f"{R1_QUESTION}</think>Hello.{R1_END}<｜User｜>2+2?<｜Assistant｜><think>⟦Sum.</think>4.{R1_END}⟧",
                f"{R1_QUESTION}<think>⟦Polite.</think>Hello.{R1_END}⟧",
            ]
        ),
    ),
    (
        "deepseek-r1-distill",
        {},
        "thoughts",
        {"split_turns": "auto"},
        Expected(
            [
                f"{R1_QUESTION}Hello.{R1_END}<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.{R1_END}⟧",
                f"{R1_QUESTION}<think>\n⟦Polite.\n</think>\n\nHello.{R1_END}⟧",
            ]
        ),
    ),
    # The template cuts a thought out of an answer's text.
    (
        "deepseek-v3.1",
        {},
        "thoughts",
        {},
        Expected(
            [f"{R1_QUESTION}</think>⟦\n\nHello.{R1_END}⟧<｜User｜>2+2?<｜Assistant｜></think>⟦\n\n4.{R1_END}⟧"],
            without_reasoning=2,
        ),
    ),
    ("nemotron-3", {}, "multi", {}, Expected([], {NO_THOUGHT: 2})),
    (
        "nemotron-3",
        {},
        "multi",
        {"open_thought": "close"},
        Expected(
            [
                f"{NEMOTRON_QUESTION}<think></think>⟦Hello.<|im_end|>⟧{NEXT}<think>\n⟦\n</think>\n4.\n\nSure.<|im_end|>⟧\n",
            ],
            shown_as_history=1,
            closed_thoughts=1,
        ),
    ),
    (
        "nemotron-3",
        {},
        "multi",
        {"open_thought": "history"},
        Expected(
            [
                f"{NEMOTRON_QUESTION}<think></think>⟦Hello.<|im_end|>⟧{NEXT}<think></think>⟦4.\n\nSure.<|im_end|>⟧\n",
            ],
            shown_as_history=2,
        ),
    ),
    (
        "nemotron-3",
        {"enable_thinking": False},
        "multi",
        {},
        Expected(
            [f"{NEMOTRON_QUESTION}<think></think>⟦Hello.<|im_end|>⟧{NEXT}<think></think>⟦4.\n\nSure.<|im_end|>⟧\n"]
        ),
    ),
    (
        "nemotron-3",
        {},
        "reasoning",
        {"split_turns": "auto"},
        Expected(
            [
                f"{NEMOTRON_QUESTION}<think></think>\nHello.<|im_end|>{NEXT}<think>\n⟦Sum.\n</think>\n4.<|im_end|>⟧\n",
                f"{NEMOTRON_QUESTION}<think>\n⟦Polite.\n</think>\nHello.<|im_end|>⟧\n",
            ]
        ),
    ),
    (
        "qwen3.5",
        {},
        "multi",
        {},
        Expected(
            [f"{QWEN_QUESTION}⟦Hello.<|im_end|>⟧{NEXT}<think>\n⟦\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n"],
            shown_as_history=1,
        ),
    ),
    (
        "qwen3.5",
        {},
        "multi",
        {"split_turns": True},
        Expected(
            [
                f"{QWEN_QUESTION}Hello.<|im_end|>{NEXT}<think>\n⟦\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n",
                f"{QWEN_QUESTION}<think>\n⟦\n</think>\n\nHello.<|im_end|>⟧\n",
            ]
        ),
    ),
    (
        "qwen3.5",
        {},
        "reasoning",
        {},
        Expected(
            [f"{QWEN_QUESTION}Hello.<|im_end|>{NEXT}<think>\n⟦Sum.\n</think>\n\n4.<|im_end|>⟧\n"], lost={REWRITTEN: 1}
        ),
    ),
    (
        "qwen3.5",
        {},
        "reasoning",
        {"split_turns": "auto"},
        Expected(
            [
                f"{QWEN_QUESTION}Hello.<|im_end|>{NEXT}<think>\n⟦Sum.\n</think>\n\n4.<|im_end|>⟧\n",
                f"{QWEN_QUESTION}<think>\n⟦Polite.\n</think>\n\nHello.<|im_end|>⟧\n",
            ]
        ),
    ),
    (
        "gemma-4",
        {},
        "multi",
        {},
        Expected(
            [
                "<bos><|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello.<turn|>⟧\n<|turn>user\n2+2?<turn|>\n<|turn>model\n"
                "<|channel>thought\n<channel|>⟦4.\n\nSure.<turn|>⟧\n"
            ],
            shown_as_history=1,
            closed_thoughts=1,
        ),
    ),
    ("gemma-4", {"enable_thinking": False}, "reasoning", {"split_turns": "auto"}, Expected([], {CLOSED_THOUGHT: 2})),
    ("gemma-4", {}, "reasoning", {"split_turns": "auto"}, Expected(GEMMA_REASONING)),
    ("gemma-4", {}, "thoughts", {"split_turns": "auto"}, Expected(GEMMA_REASONING)),
    ("gemma-4", {"enable_thinking": True}, "reasoning", {"split_turns": "auto"}, Expected(GEMMA_REASONING)),
    (
        "deepseek-v3.2",
        {},
        "reasoning",
        {"split_turns": "auto"},
        Expected(
            [
                f"{R1_QUESTION}</think>Hello.{R1_END}<｜User｜>2+2?<｜Assistant｜><think>⟦Sum.</think>4.{R1_END}⟧",
                f"{R1_QUESTION}<think>⟦Polite.</think>Hello.{R1_END}⟧",
            ]
        ),
    ),
    (
        "hermes-3",
        {},
        "tools",
        {"split_turns": "auto"},
        Expected(
            [
                '<|begin_of_text|><|im_start|>system\n<tools> {"type": "function", "function": {"name": "add", '
                '"description": "add() - \n\n", "parameters": {}} </tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n'
                '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
                "<|im_end|>⟧\n<|im_start|>tool\n<tool_response>\n4\n</tool_response>\n<|im_end|><|im_start|>assistant\n"
                "⟦Four.<|im_end|>⟧\n"
            ],
            shown_as_history=1,
        ),
    ),
]
IDS = ["-".join(map(str, [case[0], *case[1], case[2], *case[3].values()])) for case in EXPECTED]


def marked(case: tuple[str, dict[str, bool], str, dict[str, Any], Expected]) -> Expected:
    name, variables, shape, options, _ = case
    tokenizer, template = load(name)
    if variables:
        template = load_template(tokenizer, str(TEMPLATES / f"{name}.jinja"), variables)
    chat, tools = SHAPES[shape]
    encoding = template.encode(chat, tools=tools, **options)
    assert encoding == template.encode(chat, tools=tools, **options)
    return Expected(
        [mark_trained(tokenizer, row) for row in encoding.rows],
        encoding.lost,
        encoding.shown_as_history,
        encoding.closed_thoughts,
        encoding.without_reasoning,
    )


@pytest.mark.parametrize("case", EXPECTED, ids=IDS)
def test_trained_texts(case: tuple[str, dict[str, bool], str, dict[str, Any], Expected]) -> None:
    expected, result = case[4], marked(case)
    assert result == expected
    # An error of one character is noticed, and each count.
    for text in expected.rows:
        for mutation in mutations(text, load(case[0])[1].turn_end).values():
            assert bare(mutation) == bare(text) and mutation not in result.rows
    assert result != expected._replace(closed_thoughts=expected.closed_thoughts + 1)


def test_the_same_rows_whatever_the_thought_is_called() -> None:
    template = load("deepseek-r1-distill")[1]
    chat = [question("Hi"), assistant("Hello.", reasoning_content="Polite.", thinking="Polite.")]
    assert template.encode(chat) == template.encode([question("Hi"), assistant("Hello.", reasoning_content="Polite.")])


def test_a_prompt_is_the_beginning_of_its_row() -> None:
    """What inference feeds is what stands before the trained text, where the template itself shows something else."""
    for name, options in (
        ("deepseek-r1-distill", {"open_thought": "close"}),
        ("nemotron-3", {"open_thought": "close"}),
        ("gemma-4", {}),
        ("deepseek-v3.2", {}),
        ("qwen3.5", {}),
    ):
        template = load(name)[1]
        (row,) = template.encode(MULTI[:2], **options).rows  # type: ignore[arg-type]
        prompt = template.prompt_ids(MULTI[:1])
        assert row.input_ids[: len(prompt)] == prompt
        assert [label != -100 for label in row.labels].index(True) == len(prompt)


# ---- the end of a turn

R7B_TURNS = (
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi"
    "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{}<|START_OF_TURN_TOKEN|>"
    "<|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{}"
)
R7B_END = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
R7B_ENDS = {
    "turn": R7B_TURNS.format(f"⟦Hello.{R7B_END}⟧", f"⟦4.\n\nSure.{R7B_END}⟧"),
    "last": R7B_TURNS.format(f"⟦Hello.⟧{R7B_END}", f"⟦4.\n\nSure.{R7B_END}⟧"),
    "none": R7B_TURNS.format(f"⟦Hello.⟧{R7B_END}", f"⟦4.\n\nSure.⟧{R7B_END}"),
}


@pytest.mark.parametrize("choice", R7B_ENDS)
def test_both_tokens_that_close_a_turn_are_trained_or_neither(choice: str) -> None:
    tokenizer, template = load("command-r7b")
    (row,) = template.encode(MULTI, train_on_eos=choice).rows  # type: ignore[arg-type]
    text = mark_trained(tokenizer, row)
    assert text == R7B_ENDS[choice]
    assert all(text != wrong for other, wrong in R7B_ENDS.items() if other != choice)
    assert text != R7B_ENDS["turn"].replace("<|END_OF_TURN_TOKEN|>⟧", "⟧<|END_OF_TURN_TOKEN|>")


def with_eos(eos: str) -> tuple[PreTrainedTokenizerFast, Template]:
    family = FAMILIES["command-r7b"]
    tokenizer = byte_level(Family(family.specification, family.tokens, family.bos, eos))
    return tokenizer, load_template(tokenizer, str(TEMPLATES / "command-r7b.jinja"))


@pytest.mark.parametrize(
    ("eos", "turn_end"),
    [
        ("</s>", "<|END_OF_TURN_TOKEN|>"),
        ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|END_RESPONSE|>", "<|END_RESPONSE|>"),
    ],
)
def test_generation_stops_at_the_tokenizers_own_end_if_it_closes_turns_else_at_the_last(
    eos: str, turn_end: str
) -> None:
    tokenizer, template = with_eos(eos)
    assert (template.turn_end, template.turn_end_id) == (turn_end, tokenizer.convert_tokens_to_ids(turn_end))
    (row,) = template.encode(MULTI).rows
    assert mark_trained(tokenizer, row) == R7B_ENDS["turn"]


@pytest.mark.parametrize(
    ("name", "turn_end"),
    [
        ("command-r", "<|END_OF_TURN_TOKEN|>"),
        ("gemma-4", "<turn|>"),
        ("olmo-3", "<|endoftext|>"),
        ("gpt-oss", "<|return|>"),
        ("phi-3.5", "<|end|>"),
        ("glm-4.5", None),
    ],
)
def test_the_end_of_turns_of_other_families(name: str, turn_end: str | None) -> None:
    assert load(name)[1].turn_end == turn_end


# ---- small templates, each for one way to write a turn

SMALL_TOKENS = (
    "<|im_start|> <|im_end|> <|user|> <|bot|> <|close|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|>"
    " <|END_THINKING|> <|TURN|> <|USER|> <|BOT|>"
)
SMALL = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|><|user|>' + m.content + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|><|bot|>ANSWER' }}{%- endif %}{%- endfor %}"
)
ALWAYS_PROMPT = SMALL.replace("ANSWER'", "' + m.content + '<|close|><|im_end|>'") + "{{- '<|im_start|><|bot|>' }}"
OPENED_ANSWER = (
    SMALL.replace("ANSWER'", "<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|im_end|>'")
    + "{%- if add_generation_prompt %}{{- '<|im_start|><|bot|><|START_THINKING|><|END_THINKING|>' }}{%- endif %}"
)
OTHER_HEADER = (
    SMALL.replace("ANSWER'", "Human: ' + m.content + '<|im_end|>'")
    + "{%- if add_generation_prompt %}{{- '<|im_start|><|bot|>Assistant: ' }}{%- endif %}"
)
SMALL_QUESTION, SMALL_NEXT = "<|im_start|><|user|>Hi<|im_end|><|im_start|><|bot|>", "<|im_start|><|user|>2+2?<|im_end|>"


def in_capitals(text: str) -> str:
    return text.replace("<|im_start|>", "<|TURN|>").replace("<|user|>", "<|USER|>").replace("<|bot|>", "<|BOT|>")


CALLS_AFTER_HEADER = (
    SMALL.replace(
        "ANSWER' }}", "' + m.content + '<|im_end|>' }}{%- for call in m.tool_calls or [] %}CALL{%- endfor %}"
    ).replace(
        "CALL", "{{- '<|im_start|><|bot|>' + call.function.name + call.function.arguments | tojson + '<|im_end|>' }}"
    )
    + "{%- if add_generation_prompt %}{{- '<|im_start|><|bot|>' }}{%- endif %}"
)


class SmallCase(NamedTuple):
    source: str
    rows: list[str]
    lost: dict[str, int] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    chat: Chat = MULTI
    tools: Tools = None


NEXT_PROMPT_ROW = (
    f"{SMALL_QUESTION}⟦Hello.<|close|><|im_end|>⟧{SMALL_NEXT}<|im_start|><|bot|>⟦4.\n\nSure.<|close|><|im_end|>⟧"
    "<|im_start|><|bot|>"
)
SMALL_CASES = {
    "the next prompt is no end of a turn, in small letters": SmallCase(ALWAYS_PROMPT, [NEXT_PROMPT_ROW]),
    "the next prompt is no end of a turn (published: Command R7B and Command A with tools)": SmallCase(
        in_capitals(ALWAYS_PROMPT), [in_capitals(NEXT_PROMPT_ROW)]
    ),
    "what opens an answer after a closed thought is trained (published: Command R7B with tools)": SmallCase(
        OPENED_ANSWER,
        [
            f"{SMALL_QUESTION}⟦<|START_RESPONSE|>Hello.<|END_RESPONSE|><|im_end|>⟧{SMALL_NEXT}<|im_start|><|bot|>"
            "<|START_THINKING|><|END_THINKING|>⟦<|START_RESPONSE|>4.\n\nSure.<|END_RESPONSE|><|im_end|>⟧"
        ],
    ),
    "a prompt with another header opens no thought (published: Unichat, Asimov)": SmallCase(
        OTHER_HEADER, [], {NOT_AFTER_PROMPT: 2}, {"open_thought": "history"}
    ),
    "a header between an answer and its call is not trained (published: Nemotron Nano v2)": SmallCase(
        CALLS_AFTER_HEADER,
        [f'{SMALL_QUESTION}⟦I add.<|im_end|>⟧<|im_start|><|bot|>⟦add{{"left": 2}}<|im_end|>⟧'],
        chat=[question("Hi"), assistant("I add.", tool_calls=tool_talk("")[1]["tool_calls"])],
        tools=[TOOL],
    ),
}


def load_small(case: str, folder: Path) -> tuple[PreTrainedTokenizerFast, Template]:
    path = folder / "small.jinja"
    path.write_text(SMALL_CASES[case].source, encoding="utf-8")
    tokenizer = byte_level(Family(FAMILIES["chatml"].specification, SMALL_TOKENS))
    return tokenizer, load_template(tokenizer, str(path))


@pytest.mark.parametrize("case", SMALL_CASES)
def test_small_templates(case: str, tmp_path: Path) -> None:
    _, rows, lost, options, chat, tools = SMALL_CASES[case]
    tokenizer, template = load_small(case, tmp_path)
    encoding = template.encode(chat, tools=tools, **options)
    assert template.turn_end == "<|im_end|>"
    assert ([mark_trained(tokenizer, row) for row in encoding.rows], encoding.lost) == (rows, lost)


@pytest.mark.parametrize("case", SMALL_CASES)
def test_the_small_templates_are_rendered_as_they_say(case: str, tmp_path: Path) -> None:
    _, rows, _, _, chat, tools = SMALL_CASES[case]
    text = load_small(case, tmp_path)[1].render(chat, tools=tools)
    assert all(bare(row).replace("<|START_THINKING|><|END_THINKING|>", "") == text for row in rows)


# ---- reasoning that is not in a row is counted


@pytest.mark.parametrize(
    ("name", "shape", "options", "count"),
    [
        ("qwen3", "reasoning", {"train_on": "all"}, 1),
        ("qwen3", "thoughts", {"train_on": "all"}, 1),
        ("chatml", "reasoning", {"train_on": "all"}, 2),
        ("chatml", "thoughts", {"train_on": "all"}, 0),
        ("chatml", "reasoning", {}, 2),
        ("deepseek-v3.1", "thoughts", {}, 2),
        ("qwen3", "reasoning", {"split_turns": True}, 0),
    ],
)
def test_reasoning_that_is_not_written_is_counted(name: str, shape: str, options: dict[str, Any], count: int) -> None:
    assert load(name)[1].encode(SHAPES[shape][0], **options).without_reasoning == count


@pytest.mark.parametrize("shape", ["reasoning", "thoughts"])
def test_the_reasoning_of_context_is_counted_if_it_is_not_written(shape: str) -> None:
    chat = SHAPES[shape][0]
    context = [chat[0], {**chat[1], "train": False}, *chat[2:]]
    for name, count in (("qwen3", 1), ("deepseek-v3.1", 2)):
        encoding = load(name)[1].encode(context)
        assert (encoding.lost, encoding.without_reasoning) == ({}, count)
