"""Masks of published template files and of tokenizers with their own template, compared with specifications.

`test_masks` explains the specifications: ⟦ and ⟧ enclose what is trained.
"""

import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from specification import (
    ALL_SHAPES,
    CHATML,
    IM,
    MULTI,
    PHI35,
    SHAPES,
    TOOL,
    Chat,
    Family,
    Format,
    Specification,
    Tools,
    bare,
    byte_level,
    check,
    check_any_conversation,
    compare,
    get_conversation,
    mark_trained,
    mutations,
    qwen3,
    qwen25,
    system,
    user,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.chat.template import Template, load_template

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = DATA / "chat_templates" / "chujiezheng"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")

# ---- the formats

WORDS = "Conversation roles must alternate user/assistant/user/assistant/..."


def trimmed(**fields: str | bool) -> Format:
    """Return a format that trims all contents and lets user and assistant alternate, as most of these files do."""
    return Format(**{"clean": str.strip, "alternates": WORDS, **fields})  # type: ignore[arg-type]


FALCON = trimmed(user="\n\nUser: {}", assistant="\n\nAssistant:⟦ {}⟧")


def falcon(chat: Chat, tools: Tools) -> str:
    """The template replaces each two line ends in a question or answer by one, in a single pass."""

    def clean(content: str) -> str:
        return content.replace("\r\n", "\n").replace("\n\n", "\n").strip()

    opening = chat[0]["content"].strip() if chat[0]["role"] == "system" else ""
    return opening + replace(FALCON, clean=clean)(chat[1:] if chat[0]["role"] == "system" else chat, tools)


CONTEXT = trimmed(system="System: {}", start="<s>", user="\n\nUser: {}", assistant="\n\nAssistant:⟦ {}⟧")
GRANITE_TOOLS = """<|start_of_role|>available_tools<|end_of_role|>
{
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object"
        }
    }
}<|end_of_text|>
"""
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def instructions(template: Template) -> str:
    """Return the template's long text about tools, taken from a rendered system message."""
    text = template.render([system("!"), user("?")], tools=[TOOL])
    return text.removeprefix("<|im_start|>system\n!\n\n").partition("<|im_end|>\n<|im_start|>user\n?")[0]


def qwen25_published(chat: Chat, tools: Tools) -> str:
    return qwen25(QWEN_DEFAULT, instructions(load("qwen2.5-instruct")[1]))(chat, tools)


def qwen3_published(chat: Chat, tools: Tools) -> str:
    return qwen3(chat, tools, instructions(own("qwen3")[1]))


GRANITE = Format(
    system="<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n",
    user="<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n",
    assistant="<|start_of_role|>assistant<|end_of_role|>⟦{}<|end_of_text|>⟧\n",
    with_tools=(("start", GRANITE_TOOLS),),
)
PHI3 = trimmed(system="<|system|>\n{}<|end|>\n", user="<|user|>\n{}<|end|>\n", assistant="<|assistant|>\n⟦{}<|end|>⟧\n")
PHI3_TOKENS = "<|system|> <|user|> <|assistant|> <|end|>"

FAMILIES: dict[str, Family] = {
    "alpaca": Family(
        trimmed(
            start="<s>",
            system="{}\n\n",
            user="### Instruction:\n{}\n\n",
            assistant="### Response:\n⟦{}</s>⟧\n\n",
        )
    ),
    "amberchat": Family(
        trimmed(start="<s>", system="{}\n", user="###Human: {}\n", assistant="###Assistant:⟦ {}⟧\n"),
    ),
    "chatml": Family(replace(CHATML, start="<s>", clean=str.strip, alternates=WORDS, tool=""), IM),
    "chatqa": Family(CONTEXT),
    "falcon-instruct": Family(falcon),
    "gemma-it": Family(
        trimmed(
            system="{}\n\n",
            system_in_user=True,
            user="<start_of_turn>user\n{}<end_of_turn>\n",
            assistant="<start_of_turn>model\n⟦{}<end_of_turn>⟧\n",
        ),
        "<start_of_turn> <end_of_turn>",
    ),
    "granite-3.0-instruct": Family(GRANITE, "<|start_of_role|> <|end_of_role|>", "<|end_of_text|>", "<|end_of_text|>"),
    "llama-2-chat": Family(
        trimmed(
            system="<<SYS>>\n{}\n<</SYS>>\n\n",
            system_in_user=True,
            user="<s>[INST] {} [/INST]",
            assistant="⟦ {} </s>⟧",
        )
    ),
    "llama-3-instruct": Family(
        trimmed(
            start="<s>",
            system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
        ),
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    ),
    "mistral-instruct": Family(
        trimmed(start="<s>", system="{}\n\n", user="[INST] {} [/INST]", assistant="⟦ {}</s>⟧"),
    ),
    "openchat-3.5": Family(
        Format(
            start="<s>",
            system="{}<|end_of_turn|>",
            user="GPT4 Correct User: {}<|end_of_turn|>",
            assistant="GPT4 Correct Assistant:⟦ {}<|end_of_turn|>⟧",
            clean_system=str.strip,
            alternates=WORDS,
        ),
        "<|end_of_turn|>",
    ),
    "phi-3": Family(PHI3, PHI3_TOKENS),
    "phi-3-small": Family(replace(PHI3, start="<s>"), PHI3_TOKENS),
    "qwen2.5-instruct": Family(qwen25_published, IM),
    "saiga": Family(
        trimmed(
            system="<s>system\n{}</s>",
            user="<s>user\n{}</s>",
            assistant="<s>bot\n⟦{}</s>⟧",
            alternates="Conversation roles must alternate user/bot/user/bot/...",
        )
    ),
    "solar-instruct": Family(
        trimmed(
            start="<s>",
            system="### System:\n{}\n\n",
            user="### User:\n{}\n\n",
            assistant="### Assistant:\n⟦{}⟧\n\n",
        )
    ),
    "vicuna": Family(
        trimmed(start="<s>", system="{}\n\n", user="USER: {}\n", assistant="ASSISTANT:⟦ {}</s>⟧\n"),
    ),
    "zephyr": Family(
        trimmed(system="<|system|>\n{}</s>\n", user="<|user|>\n{}</s>\n", assistant="<|assistant|>\n⟦{}</s>⟧\n")
    ),
}
# Tokenizers with templates of their own.
OWN: dict[str, Family] = {
    "qwen3": Family(qwen3_published, eos="<|im_end|>", tokens="<|im_start|> <|endoftext|>"),
    "happy-llm_tokenizer_k": Family(replace(CHATML, tool=""), IM),
    "phi-3-mini": Family(PHI35, PHI3_TOKENS),
}
# Decoded text of phi-3-mini: its control tokens include the whitespace after them.
WITHOUT_SPACES = Format(
    system="<|system|>{}<|end|>",
    user="<|user|>{}<|end|>",
    assistant="<|assistant|>⟦{}<|end|>⟧",
    end="<|endoftext|>",
    clean=str.lstrip,
    clean_answer=str,
)


def with_nfc(specification: Specification) -> Specification:
    """Return the specification after Unicode composition (NFC), which some tokenizers apply."""
    return lambda chat, tools: unicodedata.normalize("NFC", specification(chat, tools))


TOKENIZED: dict[str, Specification] = {
    "qwen3": with_nfc(qwen3_published),
    "happy-llm_tokenizer_k": with_nfc(OWN["happy-llm_tokenizer_k"].specification),
    "phi-3-mini": WITHOUT_SPACES,
}
# Templates that need no control tokens beside bos and eos, with tokenizers that put a space before a text.
PLAIN = sorted(name for name, family in FAMILIES.items() if not family.tokens)
WITH_SPACE = [(name, "llama2") for name in PLAIN] + [(name, "mistral-7b") for name in ("mistral-instruct", "zephyr")]

# ---- complete texts that the specifications must give

LITERALS: dict[tuple[str, str], str] = {
    ("alpaca", "system"): (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello.</s>⟧\n\n"
        "### Instruction:\n2+2?\n\n### Response:\n⟦4.\n\nSure.</s>⟧\n\n"
    ),
    ("alpaca", "empty system"): "<s>\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello.</s>⟧\n\n",
    ("amberchat", "system"): (
        "<s>Be brief.\n###Human: Hi\n###Assistant:⟦ Hello.⟧\n###Human: 2+2?\n###Assistant:⟦ 4.\n\nSure.⟧\n"
    ),
    ("amberchat", "thoughts"): (
        "<s>###Human: Hi\n###Assistant:⟦ <think>\nPolite.\n</think>\n\nHello.⟧\n"
        "###Human: 2+2?\n###Assistant:⟦ <think>\nSum.\n</think>\n\n4.⟧\n"
    ),
    ("chatml", "system"): (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("chatml", "spaces"): (
        "<s><|im_start|>system\nBe  brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2 +  2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    ),
    ("chatqa", "system"): (
        "<s>System: Be brief.\n\nUser: Hi\n\nAssistant:⟦ Hello.⟧\n\nUser: 2+2?\n\nAssistant:⟦ 4.\n\nSure.⟧"
    ),
    ("chatqa", "empty system"): "<s>System: \n\nUser: Hi\n\nAssistant:⟦ Hello.⟧",
    ("falcon-instruct", "system"): (
        "Be brief.\n\nUser: Hi\n\nAssistant:⟦ Hello.⟧\n\nUser: 2+2?\n\nAssistant:⟦ 4.\nSure.⟧"
    ),
    ("falcon-instruct", "thoughts"): (
        "\n\nUser: Hi\n\nAssistant:⟦ <think>\nPolite.\n</think>\nHello.⟧\n\nUser: 2+2?\n\nAssistant:⟦ <think>\nSum.\n</think>\n4.⟧"
    ),
    ("gemma-it", "system"): (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦4.\n\nSure.<end_of_turn>⟧\n"
    ),
    ("gemma-it", "spaces"): (
        "<start_of_turn>user\nBe  brief.\n\n \n Hi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2 +  2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n"
    ),
    ("gemma-it", "empty system"): (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
    ),
    ("granite-3.0-instruct", "system"): (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Hello.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦4.\n\nSure.<|end_of_text|>⟧\n"
    ),
    ("granite-3.0-instruct", "tools, two questions"): (
        '<|start_of_role|>available_tools<|end_of_role|>\n{\n    "type": "function",\n    "function": {\n        "name": "add",\n'
        '        "parameters": {\n            "type": "object"\n        }\n    }\n}<|end_of_text|>\n'
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Hello.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦4.\n\nSure.<|end_of_text|>⟧\n"
    ),
    ("granite-3.0-instruct", "tools"): (
        '<|start_of_role|>available_tools<|end_of_role|>\n{\n    "type": "function",\n    "function": {\n        "name": "add",\n'
        '        "parameters": {\n            "type": "object"\n        }\n    }\n}<|end_of_text|>\n'
        "<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|><|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Four.<|end_of_text|>⟧\n"
    ),
    ("llama-2-chat", "system"): (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]⟦ Hello. </s>⟧<s>[INST] 2+2? [/INST]⟦ 4.\n\nSure. </s>⟧"
    ),
    ("llama-2-chat", "empty system"): "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nHi [/INST]⟦ Hello. </s>⟧",
    ("llama-3-instruct", "system"): (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦4.\n\nSure.<|eot_id|>⟧"
    ),
    ("llama-3-instruct", "unicode"): (
        "<s><|start_header_id|>user<|end_header_id|>\n\né中😀 שלום<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦👩‍🔬 naïve 中文。 e\u0301<|eot_id|>⟧"
    ),
    ("mistral-instruct", "system"): (
        "<s>Be brief.\n\n[INST] Hi [/INST]⟦ Hello.</s>⟧[INST] 2+2? [/INST]⟦ 4.\n\nSure.</s>⟧"
    ),
    ("mistral-instruct", "markers"): (
        "<s><s>[INST] Hi [/INST] Hello.</s>\n\n[INST] say <s>[INST] Hi [/INST] Hello.</s> [/INST]"
        "⟦ it <s>[INST] Hi [/INST] Hello.</s> is</s>⟧[INST] Hi [/INST]⟦ Hello.</s>⟧[INST] 2+2? [/INST]⟦ 4.\n\nSure.</s>⟧"
    ),
    ("openchat-3.5", "system"): (
        "<s>Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:⟦ Hello.<|end_of_turn|>⟧"
        "GPT4 Correct User: 2+2?<|end_of_turn|>GPT4 Correct Assistant:⟦ 4.\n\nSure.<|end_of_turn|>⟧"
    ),
    ("openchat-3.5", "spaces"): (
        "<s>Be  brief.<|end_of_turn|>GPT4 Correct User:  \n Hi \n\n<|end_of_turn|>"
        "GPT4 Correct Assistant:⟦ Hello.  \n<|end_of_turn|>⟧GPT4 Correct User: \t2 +  2?\n<|end_of_turn|>"
        "GPT4 Correct Assistant:⟦ \n\n It is 4. \r\n\n\n<|end_of_turn|>⟧"
    ),
    ("phi-3", "system"): (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4.\n\nSure.<|end|>⟧\n"
    ),
    ("phi-3", "empty system"): "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n",
    ("phi-3-small", "system"): (
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4.\n\nSure.<|end|>⟧\n"
    ),
    ("phi-3-small", "trailing question"): (
        "<s><|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n<|user|>\n2+2?<|end|>\n"
    ),
    ("qwen2.5-instruct", "multi"): (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen2.5-instruct", "empty system"): (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    ),
    ("saiga", "system"): (
        "<s>system\nBe brief.</s><s>user\nHi</s><s>bot\n⟦Hello.</s>⟧<s>user\n2+2?</s><s>bot\n⟦4.\n\nSure.</s>⟧"
    ),
    ("saiga", "trailing question"): "<s>user\nHi</s><s>bot\n⟦Hello.</s>⟧<s>user\n2+2?</s>",
    ("solar-instruct", "system"): (
        "<s>### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n⟦Hello.⟧\n\n"
        "### User:\n2+2?\n\n### Assistant:\n⟦4.\n\nSure.⟧\n\n"
    ),
    ("solar-instruct", "reasoning"): (
        "<s>### User:\nHi\n\n### Assistant:\n⟦Hello.⟧\n\n### User:\n2+2?\n\n### Assistant:\n⟦4.⟧\n\n"
    ),
    ("vicuna", "system"): (
        "<s>Be brief.\n\nUSER: Hi\nASSISTANT:⟦ Hello.</s>⟧\nUSER: 2+2?\nASSISTANT:⟦ 4.\n\nSure.</s>⟧\n"
    ),
    ("vicuna", "tools, two questions"): (
        "<s>USER: Hi\nASSISTANT:⟦ Hello.</s>⟧\nUSER: 2+2?\nASSISTANT:⟦ 4.\n\nSure.</s>⟧\n"
    ),
    ("zephyr", "system"): (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n"
        "<|user|>\n2+2?</s>\n<|assistant|>\n⟦4.\n\nSure.</s>⟧\n"
    ),
    ("zephyr", "spaces"): (
        "<|system|>\nBe  brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n"
        "<|user|>\n2 +  2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n"
    ),
    ("qwen3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen3", "thoughts"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nSum.\n</think>\n\n4.<|im_end|>⟧\n"
    ),
    ("happy-llm_tokenizer_k", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("happy-llm_tokenizer_k", "tools"): (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n"
    ),
    ("phi-3-mini", "system"): (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4.\n\nSure.<|end|>⟧\n<|endoftext|>"
    ),
    ("phi-3-mini", "consecutive"): (
        "<|user|>\nHi<|end|>\n<|user|>\nYou?<|end|>\n"
        "<|assistant|>\n⟦Hello.<|end|>⟧\n<|assistant|>\n⟦Bye.<|end|>⟧\n<|endoftext|>"
    ),
}

# ---- tokenizers and templates


@lru_cache
def load_pretrained(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)


@lru_cache
def load(name: str) -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = byte_level(FAMILIES[name])
    return tokenizer, load_template(tokenizer, str(FILES / f"{name}.jinja"))


@lru_cache
def own(name: str) -> tuple[PreTrainedTokenizerFast, Template]:
    return load_pretrained(name), load_template(load_pretrained(name))


@lru_cache
def loaded_with(name: str, tokenizer_name: str) -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = load_pretrained(tokenizer_name)
    return tokenizer, load_template(tokenizer, str(FILES / f"{name}.jinja"))


# ---- tests


def test_every_published_file_is_a_family_with_literals() -> None:
    assert sorted(path.stem for path in FILES.glob("*.jinja")) == sorted(FAMILIES)
    for name in [*FAMILIES, *OWN]:
        assert sum(family == name for family, _ in LITERALS) >= 2


@pytest.mark.parametrize(("name", "shape"), LITERALS)
def test_specifications_give_the_literals(name: str, shape: str) -> None:
    specification = {**FAMILIES, **OWN}[name].specification
    assert specification(*get_conversation(shape, specification)) == LITERALS[name, shape]


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_masks(name: str, shape: str) -> None:
    check(*load(name), FAMILIES[name].specification, shape)


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("name", OWN)
def test_masks_of_tokenizers_with_their_own_template(name: str, shape: str) -> None:
    check(*own(name), OWN[name].specification, shape, TOKENIZED[name])


@pytest.mark.parametrize(("name", "tokenizer_name"), WITH_SPACE)
def test_masks_with_tokenizers_that_put_a_space_before_a_text(name: str, tokenizer_name: str) -> None:
    tokenizer, template = loaded_with(name, tokenizer_name)
    for shape in ALL_SHAPES:
        check(tokenizer, template, FAMILIES[name].specification, shape)


@pytest.mark.parametrize(
    ("name", "tokenizer_name", "specification"),
    [
        ("chatml", "smollm", replace(CHATML, start="<|endoftext|>", clean=str.strip, alternates=WORDS, tool="")),
        ("qwen2.5-instruct", "qwen3", qwen25_published),
    ],
    ids=["smollm", "qwen3"],
)
def test_masks_with_real_byte_level_tokenizers(name: str, tokenizer_name: str, specification: Specification) -> None:
    for shape in ALL_SHAPES:
        tokenizer, template = loaded_with(name, tokenizer_name)
        check(tokenizer, template, specification, shape, with_nfc(specification) if tokenizer_name == "qwen3" else None)


def test_the_call_of_a_tool_with_the_published_qwen_templates() -> None:
    for tokenizer, template in (loaded_with("qwen2.5-instruct", "qwen3"), own("qwen3")):
        chat, tools = SHAPES["tools"]
        (row,) = template.encode(chat, tools=tools).rows
        text = mark_trained(tokenizer, row)
        assert text.endswith("⟧\n") and text[text.index("<|im_start|>user") :].startswith(
            '<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": '
            '{"a": 2, "b": 2}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n'
        )


def test_the_context_of_chatqa_stands_after_the_system_message() -> None:
    tokenizer, template = load("chatqa")
    chat = [system("Be brief."), {"role": "context", "content": " It is May. "}, *MULTI]
    assert [mark_trained(tokenizer, row) for row in template.encode(chat).rows] == [
        "<s>System: Be brief.\n\nIt is May.\n\nUser: Hi\n\nAssistant:⟦ Hello.⟧\n\nUser: 2+2?\n\nAssistant:⟦ 4.\n\nSure.⟧"
    ]


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_a_wrong_expectation_is_noticed(name: str) -> None:
    tokenizer, template = own(name) if name in OWN else load(name)
    expected, encoding = (TOKENIZED.get(name) or FAMILIES[name].specification)(MULTI, None), template.encode(MULTI)
    compare(tokenizer, template, MULTI, expected, encoding)
    for mutation in mutations(expected, template.turn_end).values():
        assert bare(mutation) == bare(expected)
        with pytest.raises(AssertionError):
            compare(tokenizer, template, MULTI, mutation, encoding)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation(name: str) -> None:
    check_any_conversation(FAMILIES[name], *load(name), examples=12)


@pytest.mark.parametrize("name", ["qwen3", "happy-llm_tokenizer_k"])
def test_any_conversation_with_its_own_tokenizer(name: str) -> None:
    check_any_conversation(OWN[name], *own(name), examples=12, may_lose=name == "qwen3")


@pytest.mark.parametrize(("name", "tokenizer_name"), WITH_SPACE)
def test_any_conversation_with_a_space_before_a_text(name: str, tokenizer_name: str) -> None:
    check_any_conversation(FAMILIES[name], *loaded_with(name, tokenizer_name), examples=6)
