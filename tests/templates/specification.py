"""Specifications of chat formats, written by hand: the text of a conversation, with ⟦ and ⟧ around what is trained.

Also the conversations to try them on (`SHAPES`), the comparison of a mask with a specification, and wrong
specifications (`mutations`) that the comparison must notice.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.chat.template import EncodedConversation, EncodedRow, Template
from accel_llm.errors import DataError

Chat = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Specification = Callable[[Chat, Tools], str]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_JSON = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
ARGUMENTS = '{"a": 2, "b": 2}'
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"}
QWEN_TOOLS = "# Tools\n\n<tools>\n" + TOOL_JSON + "\n</tools>"
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'.replace("{}", ARGUMENTS)
QWEN_RESULT = "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n"
IM = "<|im_start|> <|im_end|>"
PIECES = st.one_of(
    st.text(alphabet="aB1 .\n\r\té中😀<|>/", max_size=8),
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "</s>",
            "<s>",
            "[INST]",
            "[/INST]",
            "<|im_end|>",
            "<|end|>",
            "<|eot_id|>",
            "assistant",
            "USER:",
        ]
    ),
    st.sampled_from(["Hello. ", "\n\n", "  ", "</think>\n\n", "<think>\n", "/no_think"]),
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def with_markers(specification: Specification) -> tuple[Chat, Tools]:
    """Return a conversation whose contents hold everything that the family's own template writes."""
    markers = bare(specification(SINGLE, None))
    return [system(markers), user(f"say {markers}"), assistant(f"it {markers} is"), *MULTI], None


def get_conversation(shape: str, specification: Specification) -> tuple[Chat, Tools]:
    """Return the messages and tools of a shape. The shape "markers" depends on the family."""
    if shape != "markers":
        return SHAPES[shape]
    chat, tools = with_markers(specification)
    try:
        specification(chat, tools)
    except Refusal:
        return chat[1:], tools
    return chat, tools


class Refusal(Exception):
    """The template refuses the conversation, with these words."""


def bare(text: str) -> str:
    """Return a text without the marks around what is trained."""
    return text.replace("⟦", "").replace("⟧", "")


def fill(pattern: str, text: str) -> str:
    return text.join(pattern.split("{}"))


def unchanged(text: str) -> str:
    return text


def take_turns(chat: Chat, words: str) -> None:
    """Refuse a conversation, with the template's words, if users and assistants do not alternate."""
    if any((message["role"] == "user") != (index % 2 == 0) for index, message in enumerate(chat)):
        raise Refusal(words)


@dataclass(frozen=True)
class Format:
    """A chat format: one pattern for each kind of message, in which `{}` is the content after `clean`.

    Fields with reasoning are not shown.
    """

    user: str
    assistant: str
    system: str = ""
    start: str = ""
    no_system: str = ""
    end: str = ""
    clean: Callable[[str], str] = unchanged
    clean_answer: Callable[[str], str] | None = None
    clean_system: Callable[[str], str] | None = None
    system_in_user: bool = False  # the system text is part of the first question
    alternates: str | None = None  # if turns must alternate: the template's words when they do not
    call: str = ""  # `{}` is the arguments; if empty, calls are not shown and their turns are not trained
    tool: str = ""  # if empty, a tool's results are not shown
    answer_after_tool: str = ""
    with_tools: tuple[tuple[str, str], ...] = ()  # fields that change when tools are listed
    before_first_question: str = ""  # tools, inside the first question
    before_last_question: str = ""  # tools, before the last question; answers to earlier ones are not trained

    def __call__(self, chat: Chat, tools: Tools) -> str:
        if tools and self.with_tools:
            return replace(self, with_tools=(), **dict(self.with_tools))(chat, tools)
        has_system = chat[0]["role"] == "system"
        opening = (
            fill(self.system, (self.clean_system or self.clean)(chat[0]["content"])) if has_system else self.no_system
        )
        chat = chat[1:] if has_system else chat
        if self.alternates:
            without_tools = [message for message in chat if message["role"] != "tool" and "tool_calls" not in message]
            take_turns(without_tools if self.tool else chat, self.alternates)
        questions = [index for index, message in enumerate(chat) if message["role"] == "user"]
        text = self.start + ("" if self.system_in_user else opening)
        for index, message in enumerate(chat):
            after_tool = index > 0 and chat[index - 1]["role"] == "tool"
            pattern, content = self._turn(message, after_tool)
            if self.system_in_user and index == 0:
                content = self.clean(opening + message["content"])
            if tools and self.before_first_question and index == questions[0]:
                content = self.before_first_question + content
            if tools and self.before_last_question:
                text += self.before_last_question if index == questions[-1] else ""
                pattern = bare(pattern) if index < questions[-1] else pattern
            text += fill(pattern, content)
        return text + self.end

    def _turn(self, message: dict[str, Any], after_tool: bool) -> tuple[str, str]:
        if "tool_calls" in message:
            return (self.call, ARGUMENTS) if self.call else (bare(self.assistant), "")
        if message["role"] == "assistant":
            pattern = self.answer_after_tool if after_tool and self.answer_after_tool else self.assistant
            return pattern, (self.clean_answer or self.clean)(message["content"])
        return {"user": self.user, "tool": self.tool}[message["role"]], self.clean(message["content"])


def qwen25(default: str, tools: str) -> Format:
    return replace(
        CHATML,
        no_system=f"<|im_start|>system\n{default}<|im_end|>\n",
        call=f"<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n",
        tool=QWEN_RESULT,
        with_tools=(
            ("system", "<|im_start|>system\n{}\n\n" + tools + "<|im_end|>\n"),
            ("no_system", f"<|im_start|>system\n{default}\n\n{tools}<|im_end|>\n"),
        ),
    )


def qwen3(chat: Chat, tools: Tools, tools_text: str = QWEN_TOOLS, prompt: str = "") -> str:
    """Thoughts are shown only after the last question. The last answer gets an empty thought if it has none.

    `prompt` is what the generation prompt itself writes of a thought.
    """
    with_thought = CHATML.assistant.replace("⟦", f"{prompt}⟦")
    opening = [chat[0]["content"]] if chat[0]["role"] == "system" else []
    opening += [tools_text] if tools else []
    text = fill(CHATML.system, "\n\n".join(opening)) if opening else ""
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] == "user":
            text += fill(CHATML.user, content)
        elif message["role"] == "tool":
            text += fill(QWEN_RESULT, content)
        elif message["role"] == "assistant":
            thought, answer = thought_and_answer(message)
            output = QWEN_CALL if "tool_calls" in message else answer
            if index > last_question and (thought or message is chat[-1]):
                output = f"<think>\n{thought}\n</think>\n\n".removeprefix(prompt) + output.lstrip("\n")
                text += fill(with_thought if has_same_prompt(chat, index) else bare(with_thought), output)
            elif (
                thought or "</think>" in content or answer.startswith("\n")
            ):  # shown in another way when it is the last
                text += fill(bare(CHATML.assistant), output)
            else:
                text += fill(
                    CHATML.assistant if chat[index - 1]["role"] != "assistant" else bare(CHATML.assistant), output
                )
    return text


def has_same_prompt(chat: Chat, index: int) -> bool:
    """Whether the text before this answer is still its prompt.

    It is not if another answer stands before it that lost its (empty) thought when it was no longer the last one.
    """
    before = chat[index - 1]
    return before["role"] != "assistant" or thought_and_answer(before)[0] != ""


def thought_and_answer(message: dict[str, Any]) -> tuple[str, str]:
    thought, answer = message.get("reasoning_content", ""), message["content"]
    if not thought and "</think>" in answer:
        thought = answer[: answer.index("</think>")].rpartition("<think>")[2]
        answer = answer.rpartition("</think>")[2].lstrip("\n")
    return thought.strip("\n"), answer


def own_thought(content: str, opened: bool = True) -> tuple[str, str]:
    """Return the thought with which an answer's text begins, and the rest; ("", content) if it begins with none.

    With `opened` the prompt has opened the thought, so its opening tag may be missing.
    """
    before, closing, answer = content.partition("</think>")
    start, opening, thought = before.partition("<think>")
    begins = opening and not start.strip()
    if not begins and (opening or not opened):
        return "", content
    thought, answer = (thought if begins else before).strip(), answer.lstrip()
    return (thought, answer) if closing and thought and answer else ("", content)


def with_own_thoughts(chat: Chat, opened: bool = True) -> Chat:
    """Return the messages with the thoughts of their answers' texts as reasoning."""
    taken = []
    for message in chat:
        if message["role"] == "assistant" and "reasoning_content" not in message:
            thought, answer = own_thought(message["content"], opened)
            message = {**message, "content": answer, "reasoning_content": thought} if thought else message
        taken.append(message)
    return taken


@dataclass(frozen=True)
class Family:
    specification: Specification
    tokens: str = ""  # control tokens beside bos and eos
    bos: str = "<s>"
    eos: str = "</s>"
    rendered: Specification | None = None  # the template's own text, if rows have another: a thought, or a variable
    calls_without_content: bool = False  # the template writes the calls of a message only if its content is None

    @property
    def two_in_a_row(self) -> bool:
        """Whether anyone may speak twice."""
        try:
            self.specification(SHAPES["consecutive"][0], None)
        except Refusal:
            return False
        return True


def byte_level(family: Family) -> PreTrainedTokenizerFast:
    """Train a tiny byte-level tokenizer with the family's control tokens; it merges line ends and spaces."""
    special_tokens = list(dict.fromkeys([family.bos, family.eos, *family.tokens.split()]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant\n\nHello. It is 4.\n\nSure.  Hi\n\n\nHi think"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos)


def mark_trained(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    """Return the row's text with ⟦ ⟧ around what is trained.

    Pieces are cut from decoded prefixes of the row, because some decoders strip a first space.
    """
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    text, end, before = "", 0, ""
    for trained, group in groupby(label != -100 for label in row.labels):
        end += len(list(group))
        now = tokenizer.decode(row.input_ids[:end])
        text += f"⟦{now[len(before) :]}⟧" if trained else now[len(before) :]
        before = now
    return text


def without_end_spaces(text: str) -> str:
    """Return a text with the whitespace at the end of answers moved out of the marks.

    Without an end-of-turn token, whitespace on both sides of an answer's end may be one token.
    """
    return re.sub(r"(\s*)⟧(\s*)", r"⟧\1\2", text)


def compare(
    tokenizer: PreTrainedTokenizerFast, template: Template, chat: Chat, expected: str, encoding: EncodedConversation
) -> None:
    """Compare a conversation's mask with the expected text. Every assistant turn must be trained or counted as lost."""
    assert expected.count("⟦") + sum(encoding.lost.values()) == sum(turn["role"] == "assistant" for turn in chat)
    expected = expected.replace("⟧⟦", "")  # turns that touch each other are one run of labels
    texts = [mark_trained(tokenizer, row) for row in encoding.rows]
    if template.turn_end is None:
        expected, texts = without_end_spaces(expected), [without_end_spaces(text) for text in texts]
    assert texts == ([expected] if "⟦" in expected else [])


def plain_ids(tokenizer: PreTrainedTokenizerFast, expected: str, template: Template) -> list[int]:
    """Return the ids that inference and generation would give.

    If the tokenizer puts nothing before a text, prompts and answers are tokenized apart: the whole text may differ from
    that where whitespace stands on both sides of a border. Otherwise the whole text is tokenized.
    """
    if template.turn_end is None or token_ids(tokenizer, "\na") != token_ids(tokenizer, "\n") + token_ids(
        tokenizer, "a"
    ):
        return token_ids(tokenizer, bare(expected))
    return [token for piece in re.split("[⟦⟧]", expected) for token in token_ids(tokenizer, piece)]


def control_tokens(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Counter[str]:
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Counter(control[token] for token in ids if token in control)


def format_control_tokens(
    tokenizer: PreTrainedTokenizerFast, specification: Specification, chat: Chat, tools: Tools
) -> Counter[str]:
    """Count the control tokens that the format writes itself; messages must add none to them."""
    harmless = []
    for message in chat:
        thinks = own_thought(message["content"], opened=False)[0]  # which may need a variable, and so a token
        harmless.append({**message, "content": "<think>x</think>x" if thinks else message["content"] and "x"})
    return control_tokens(tokenizer, token_ids(tokenizer, bare(specification(harmless, tools))))


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def check(
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    specification: Specification,
    shape: str,
    tokenized: Specification | None = None,
    rendered: Specification | None = None,
    calls_without_content: bool = False,
) -> None:
    """Check the text, the mask and the ids of a conversation against the specification.

    `tokenized` is the specification of the decoded text, if the tokenizer changes the text (removes spaces). `rendered`
    and `calls_without_content` are those of `Family`.
    """
    chat, tools = get_conversation(shape, specification)
    try:
        expected = specification(chat, tools)
    except Refusal as refusal:
        with pytest.raises(DataError) as raised:
            template.encode(chat, tools=tools)
        assert str(refusal) in str(raised.value)
        return
    text = bare((rendered or specification)(chat, tools))
    assert template.render(chat, tools=tools) == text
    if calls_without_content:
        # `apply_chat_template` drops a content that is None, so no call could be written.
        chat_for_template = [turn | {"content": None} if "tool_calls" in turn else turn for turn in chat]
        options = {"chat_template": template.source, "tools": tools, **tokenizer.special_tokens_map}
        assert text == render_jinja_template([chat_for_template], **options)[0][0]
    else:
        assert text == tokenizer.apply_chat_template(chat, tools=tools, chat_template=template.source, tokenize=False)  # type: ignore[arg-type]
    encoding = template.encode(chat, tools=tools)
    compare(tokenizer, template, chat, tokenized(chat, tools) if tokenized else expected, encoding)
    for row in encoding.rows:
        assert control_tokens(tokenizer, row.input_ids) == format_control_tokens(tokenizer, specification, chat, tools)
        if shape != "markers" and (shape != "spaces" or (template.turn_end and not tokenized)):
            assert row.input_ids == plain_ids(tokenizer, expected, template)


def mutations(expected: str, end: str | None) -> dict[str, str]:
    """Return wrong expectations by name; in each the marks of the last trained turn are wrong."""
    if "⟦" not in expected:
        return {"something is trained": f"{expected[:-1]}⟦{expected[-1]}⟧"}
    before, _, rest = expected.rpartition("⟦")
    inside, _, after = rest.rpartition("⟧")
    texts = {
        "starts late": f"{before}{inside[0]}⟦{inside[1:]}⟧{after}",
        "starts early": f"{before[:-1]}⟦{before[-1]}{inside}⟧{after}",
        "nothing is trained": f"{before}{inside}{after}",
        "end is left out": f"{before}⟦{inside[: -len(end or '.')]}⟧{inside[-len(end or '.') :]}{after}",
    }
    return texts | ({"goes on": f"{before}⟦{inside}{after[0]}⟧{after[1:]}"} if after and end else {})


def conversations(family: Family) -> st.SearchStrategy[Chat]:
    own = bare(family.specification(SINGLE, None))
    texts = st.lists(st.one_of(PIECES, st.sampled_from([own, *family.tokens.split()])), min_size=1, max_size=4)
    questions = texts.map("".join).map(user)
    answers = texts.map("".join).filter(str.strip)
    turns = st.one_of(
        answers.map(assistant),
        st.builds(lambda answer, thought: assistant(answer, reasoning_content=thought), answers, st.just("Hm.\n")),
    )
    exchanges = st.tuples(
        st.lists(questions, min_size=1, max_size=2) if family.two_in_a_row else questions.map(lambda turn: [turn]),
        st.lists(turns, min_size=1, max_size=2) if family.two_in_a_row else turns.map(lambda turn: [turn]),
    ).map(lambda pair: pair[0] + pair[1])
    opening = st.one_of(st.just([]), texts.map("".join).map(lambda text: [system(text)]))
    talk = st.lists(exchanges, min_size=1, max_size=3).map(lambda parts: [turn for part in parts for turn in part])
    return st.builds(lambda first, rest: first + rest, opening, talk)


def targets(marked: str) -> set[tuple[int, int]]:
    """Return the spans between ⟦ and ⟧, in characters of the text without them."""
    ends = list(accumulate(map(len, re.split("[⟦⟧]", marked)[:-1])))
    return set(zip(ends[0::2], ends[1::2], strict=True))


def check_any_conversation(
    family: Family, tokenizer: PreTrainedTokenizerFast, template: Template, examples: int, may_lose: bool = False
) -> None:
    """Check random conversations against the family's specification: their text, what is trained and what is lost.

    With `may_lose` the template may lose more turns than the specification does, but never train anything else.
    """

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(conversations(family))
    def holds(chat: Chat) -> None:
        try:
            expected = family.specification(chat, None)
        except Refusal:
            with pytest.raises(DataError):
                template.encode(chat)
            return
        encoding = template.encode(chat)
        assert len(encoding.rows) <= 1
        touching = 0 if may_lose else expected.count("⟧⟦")  # turns that are one run of labels
        expected = expected.replace("⟧⟦", "")
        trained: set[tuple[int, int]] = set()
        for row in encoding.rows:
            marked = mark_trained(tokenizer, row)
            if template.turn_end is None:
                marked, expected = without_end_spaces(marked), without_end_spaces(expected)
            assert bare(marked) == bare(expected)
            assert control_tokens(tokenizer, row.input_ids) == format_control_tokens(
                tokenizer, family.specification, chat, None
            )
            trained = targets(marked)
        assert trained <= targets(expected) if may_lose else trained == targets(expected)
        lost = sum(encoding.lost.values())
        assert len(trained) + touching + lost == sum(turn["role"] == "assistant" for turn in chat)

    holds()


SINGLE = [user("Hi"), assistant("Hello.")]
MULTI = [*SINGLE, user("2+2?"), assistant("4.\n\nSure.")]
SHAPES: dict[str, tuple[Chat, Tools]] = {
    "single": (SINGLE, None),
    "multi": (MULTI, None),
    "system": ([system("Be brief."), *MULTI], None),
    "tools": ([user("2+2?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Four.")], [TOOL]),
    "tools, two questions": (MULTI, [TOOL]),
    "reasoning": (
        [
            user("Hi"),
            assistant("Hello.", reasoning_content="Polite."),
            user("2+2?"),
            assistant("4.", reasoning_content="Sum."),
        ],
        None,
    ),
    "thoughts": (
        [
            user("Hi"),
            assistant("<think>\nPolite.\n</think>\n\nHello."),
            user("2+2?"),
            assistant("<think>\nSum.\n</think>\n\n4."),
        ],
        None,
    ),
    "no_think": ([system("/no_think"), *MULTI], None),
    "consecutive": ([user("Hi"), user("You?"), assistant("Hello."), assistant("Bye.")], None),
    "empty system": ([system(""), *SINGLE], None),
    "unicode": ([user("é中😀 שלום"), assistant("👩‍🔬 naïve 中文。 e\u0301")], None),
    "spaces": (
        [
            system(" Be  brief. \n"),
            user(" \n Hi \n\n"),
            assistant("Hello.  \n"),
            user("\t2 +  2?\n"),
            assistant("\n\n It is 4. \r\n\n\n"),
        ],
        None,
    ),
    "trailing question": (MULTI[:3], None),
}
ALL_SHAPES = [*SHAPES, "markers"]
CHATML = Format(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    assistant="<|im_start|>assistant\n⟦{}<|im_end|>⟧\n",
    tool="<|im_start|>tool\n{}<|im_end|>\n",
)
PHI35 = Format(
    system="<|system|>\n{}<|end|>\n",
    user="<|user|>\n{}<|end|>\n",
    assistant="<|assistant|>\n⟦{}<|end|>⟧\n",
    end="<|endoftext|>",
)
