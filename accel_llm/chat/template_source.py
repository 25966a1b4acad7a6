"""Finds the source of a chat template: the tokenizer's own, the built-in one, or a Jinja file."""

import re
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from accel_llm.chat.sandbox import MAX_SOURCE, check_template_size
from accel_llm.errors import ConfigError

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_INDENTED_OUTPUT = re.compile(r"^[ \t]+\{\{(?!-)", re.MULTILINE)


class TemplateSource(NamedTuple):
    """The source of a template, and the one for rows with tools if the tokenizer has another for them."""

    text: str
    for_tools: str | None = None


def read_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> TemplateSource:
    """Return the template that `chat_template` names: `chatml`, a name of the tokenizer's templates, or a file.

    None is the tokenizer's own template. A tokenizer with several has them under names; as in `apply_chat_template`,
    `tool_use` is for rows with tools and `default` for all others.

    Raises:
        ConfigError: there is no such template, or its source is implausibly long.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if chat_template is None:
        if not own:
            raise ConfigError(
                f"chat_template: the tokenizer {tokenizer.name_or_path!r} has none of its own; set one "
                "(chat_template: chatml | path/to/file.jinja)."
            )
        if not named:
            return TemplateSource(str(own))
        if "default" not in named:
            raise ConfigError(
                f"chat_template: the tokenizer {tokenizer.name_or_path!r} has several templates, but none is named "
                f"default; name one of {', '.join(named)}."
            )
        return TemplateSource(named["default"], named.get("tool_use"))
    if chat_template in named:
        return TemplateSource(named[chat_template])
    if chat_template == "chatml":
        return TemplateSource(CHATML)

    # A file; no more of it is read than a template may have.
    path = Path(chat_template)
    if not path.is_file():
        names = f", nor one of the tokenizer's templates ({', '.join(named)})" if named else ""
        raise ConfigError(
            f"chat_template: {chat_template!r} is neither a file nor chatml, the built-in template{names}."
        )
    with path.open(encoding="utf-8") as file:
        source = file.read(MAX_SOURCE + 1)
    check_template_size(source)
    return TemplateSource(_remove_indentation(source))


def describe_template(chat_template: str | None) -> str:
    """Return how messages name the template."""
    return "the tokenizer's own template" if chat_template is None else repr(chat_template)


def _remove_indentation(source: str) -> str:
    """Join the lines of a file that is written as indented lines of whole tags; return any other file unchanged.

    Some template collections publish such files and say to join the lines before use: otherwise the indentation before
    an output would be in every prompt.
    """
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    if _INDENTED_OUTPUT.search(source) and all(line[0] == "{" and line[-1] == "}" for line in lines):
        return "".join(lines)
    return source
