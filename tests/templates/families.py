"""The families of chat formats that the tests hold: a specification and the control tokens for each template file.

A specification (`Format`, or a function if a format needs more) builds a family's text by joining strings; it never
renders a template. ⟦ and ⟧ enclose what is trained. The templates follow the published formats, but instructions
about tools and default system messages are shorter. Control tokens are those of the family, in a tiny byte-level
tokenizer.
"""

# ruff: noqa: RUF001 (DeepSeek's control tokens are written with a fullwidth bar)
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from specification import (
    ARGUMENTS,
    CHATML,
    IM,
    PHI35,
    QWEN_CALL,
    QWEN_RESULT,
    QWEN_TOOLS,
    TOOL_JSON,
    Chat,
    Family,
    Format,
    Refusal,
    Tools,
    bare,
    byte_level,
    fill,
    qwen3,
    qwen25,
    system,
    take_turns,
    thought_and_answer,
    unchanged,
    with_own_thoughts,
)
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template import Template, load_template

TEMPLATES = Path(__file__).parent


# ---- the formats


LLAMA_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"


def llama31(chat: Chat, tools: Tools) -> str:
    head = "<|begin_of_text|>" + LLAMA_SYSTEM + ("Environment: ipython\n" if tools else "")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return Format(
        start=f"{head}Cutting Knowledge Date: December 2023\nToday Date: {datetime.now():%d %b %Y}\n\n",
        system="{}<|eot_id|>",
        no_system="<|eot_id|>",
        user=fill(header, "user") + "{}<|eot_id|>",
        assistant=fill(header, "assistant") + "⟦{}<|eot_id|>⟧",
        call=fill(header, "assistant") + '⟦{"name": "add", "parameters": {}}<|eot_id|>⟧',
        tool=fill(header, "ipython") + '"{}"<|eot_id|>',
        clean=str.strip,
        before_first_question=f"Functions:\n\n{TOOL_JSON}\n\n",
    )(chat, tools)


MISTRAL_WORDS = "After the system message, user and assistant take turns!"
MISTRAL_V3 = Format(
    start="<s>",
    user="[INST] {}[/INST]",
    assistant="⟦ {}</s>⟧",
    clean_answer=str.strip,
    alternates=MISTRAL_WORDS,
    call='⟦[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "call00001"}]</s>⟧',
    tool='[TOOL_RESULTS] {"content": {}, "call_id": "call00001"}[/TOOL_RESULTS]',
    before_last_question=f"[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS]",
)
MISTRAL_V7 = Format(
    start="<s>",
    system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
    user="[INST]{}[/INST]",
    assistant="⟦{}</s>⟧",
    alternates=MISTRAL_WORDS,
    call='⟦[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "call00001"}]</s>⟧',
    tool="[TOOL_RESULTS]call00001[TOOL_CONTENT]{}[/TOOL_RESULTS]",
    before_last_question=f"[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS]",
)


def mistral_v3(chat: Chat, tools: Tools) -> str:
    """The system message moves to the last question if nothing follows it, so no finished turn continues its prompt."""
    if chat[0]["role"] != "system":
        return MISTRAL_V3(chat, tools)
    text = bare(MISTRAL_V3(chat[1:], tools))
    assert chat[-1]["role"] == "assistant"
    return text


GEMMA = Format(
    start="<bos>",
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    assistant="<start_of_turn>model\n⟦{}<end_of_turn>⟧\n",
    clean=str.strip,
    alternates="Roles must alternate!",
)


def gemma2(chat: Chat, tools: Tools) -> str:
    if chat[0]["role"] == "system":
        raise Refusal("System role not supported")
    return GEMMA(chat, tools)


def gemma3(chat: Chat, tools: Tools) -> str:
    if chat[0]["role"] != "system":
        return GEMMA(chat, tools)
    take_turns(chat[1:], "Roles must alternate!")
    text = GEMMA(chat[1:], tools)
    start = "<bos><start_of_turn>user\n"
    return start + chat[0]["content"] + "\n\n" + text.removeprefix(start)


def phi35(chat: Chat, tools: Tools) -> str:
    return PHI35(chat[1:] if chat[0] == system("") else chat, tools)


PHI4 = Format(
    system="<|im_start|>system<|im_sep|>{}<|im_end|>",
    user="<|im_start|>user<|im_sep|>{}<|im_end|>",
    assistant="<|im_start|>assistant<|im_sep|>⟦{}<|im_end|>⟧",
    tool="<|im_start|>tool<|im_sep|>{}<|im_end|>",
)
DEEPSEEK_V3 = Format(
    start="<｜begin▁of▁sentence｜>",
    system="{}",
    user="<｜User｜>{}",
    assistant="<｜Assistant｜>⟦{}<｜end▁of▁sentence｜>⟧",
    call="<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧",
    tool="<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>",
    answer_after_tool="<｜tool▁outputs▁end｜>⟦{}<｜end▁of▁sentence｜>⟧",
)


def deepseek_r1(chat: Chat, tools: Tools, in_rows: bool = True, with_tools: bool = False) -> str:
    """The prompt opens a thought that no finished turn shows.

    Reasoning that history drops, also that of the answer's own text, is written into the thought of the last turn
    (`in_rows`). After tool results (`with_tools`) the prompt opens none.
    """
    chat = with_own_thoughts(chat) if in_rows else chat
    text = "<｜begin▁of▁sentence｜>"
    for index, message in enumerate(chat):
        if message["role"] in ("system", "user"):
            text += ("<｜User｜>" if message["role"] == "user" else "") + message["content"]
        elif message["role"] == "tool":
            result = f"<｜tool▁output▁begin｜>{message['content']}<｜tool▁output▁end｜>"
            text += f"<｜tool▁outputs▁begin｜>{result}<｜tool▁outputs▁end｜>" if with_tools else ""
        elif "tool_calls" in message and with_tools:  # one call alone is never closed
            call = f"function<｜tool▁sep｜>add\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
            text += f"<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}"
        elif chat[index - 1]["role"] == "tool" and with_tools:
            text += f"⟦{message['content']}<｜end▁of▁sentence｜>⟧"
        elif message["role"] == "assistant":
            answer = message["content"].rpartition("</think>")[2] + "<｜end▁of▁sentence｜>"
            thought = message.get("reasoning_content")
            if thought and index == len(chat) - 1 and in_rows:
                answer = answer.removeprefix("<think>\n")  # which the prompt has written
                answer = f"<think>\n⟦{thought}\n</think>\n\n{answer}⟧"
            text += "<｜Assistant｜>" + answer
    return text


def deepseek_r1_thinking(chat: Chat, tools: Tools) -> str:
    """The prompt opens the thought and the last turn continues it; earlier turns lose their thought and its opening.

    An earlier turn that had no thought is trained as it is shown.
    """
    text = "<｜begin▁of▁sentence｜>"
    for index, message in enumerate(chat):
        if message["role"] in ("system", "user"):
            text += ("<｜User｜>" if message["role"] == "user" else "") + message["content"]
        elif message["role"] == "assistant":
            thought = thought_and_answer(message)[0].strip()
            answer = message["content"].rpartition("</think>")[2].strip()
            not_shown = thought or "</think>" in message["content"] or "tool_calls" in message
            turn = f"<｜Assistant｜><think>\n⟦{thought}\n</think>\n\n{answer}<｜end▁of▁sentence｜>⟧"
            if message is not chat[-1]:
                turn = f"<｜Assistant｜>⟦{answer}<｜end▁of▁sentence｜>⟧"
                turn = bare(turn) if not_shown else turn
            text += bare(turn) if chat[index - 1]["role"] == "assistant" else turn
    return text


def deepseek_v32(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    """The prompt opens and closes a thought, answers stand after its closing tag alone.

    The last answer is trained after the prompt (`in_rows`), earlier ones as they are shown. If any answer has reasoning,
    the package lets the template think: the prompt opens a thought and does not close it, and every turn after the last
    question shows its own, an empty one too.
    """
    chat = with_own_thoughts(chat, opened=False) if in_rows else chat
    thinks = in_rows and any("reasoning_content" in message for message in chat)
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    end, before, rewritten = "<｜end▁of▁sentence｜>", "", False
    text = "<｜begin▁of▁sentence｜>"
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] == "system":
            text += content
        text += DSML_TOOLS if tools and index == 0 else ""
        if message["role"] == "user":
            text, before, rewritten = text + f"<｜User｜>{content}", "<｜Assistant｜>", False
        elif message["role"] == "tool":
            text, before = text + f"\n\n<function_results>\n<result>{content}</result>\n</function_results>", "\n\n"
        elif message["role"] == "assistant":
            answer = (DSML_CALL if "tool_calls" in message else content) + end
            thought = message.get("reasoning_content", "")
            turn = f"⟦{answer}⟧"  # an answer after an answer has no prompt
            turn = bare(turn) if rewritten else turn
            if before and thinks and index > last_question:
                turn = f"{before}<think>⟦{thought}</think>{answer}⟧"
            elif before and index == len(chat) - 1 and in_rows:
                turn = f"{before}<think></think>⟦{answer}⟧"
            elif before:
                turn = f"{before}</think>" + (answer if thought else f"⟦{answer}⟧")
                rewritten = thinks  # the thought that it had as the last turn is missing before the next one
            text, before = text + turn, ""
    return text


DSML_TOOLS = '## Tools\n\n<functions>\n{"name": "add", "parameters": {"type": "object"}}\n</functions>\n'
DSML_CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)


def gpt_oss(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    """The model writes its channels itself. History shows earlier answers with another end, which is not trained."""
    chat = with_own_thoughts(chat, opened=False) if in_rows else chat
    text = f"<|start|>system<|message|>Current date: {datetime.now():%Y-%m-%d}\n\nReasoning: medium<|end|>"
    instructions = (
        "# Instructions\n\n" + chat[0]["content"] if chat[0]["role"] == "system" and chat[0]["content"] else ""
    )
    parts = [instructions] * bool(instructions) + [f"# Tools\n\n{TOOL_JSON}"] * bool(tools)
    text += "<|start|>developer<|message|>" + "\n\n".join(parts) + "<|end|>" if parts else ""
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] == "user":
            text += f"<|start|>user<|message|>{content}<|end|>"
        elif message["role"] == "tool":
            text += f'<|start|>functions.add to=assistant<|channel|>commentary<|message|>"{content}"<|end|>'
        elif "tool_calls" in message:
            text += (
                "<|start|>assistant⟦ to=functions.add<|channel|>commentary json<|message|>" + ARGUMENTS + "<|call|>⟧"
            )
        elif message["role"] == "assistant":
            thought = message.get("reasoning_content")
            analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
            turn = f"<|start|>assistant⟦{analysis}<|channel|>final<|message|>{content}<|return|>⟧"
            if message is not chat[-1]:
                turn = f"<|start|>assistant⟦<|channel|>final<|message|>{content}⟧<|end|>"
                turn = bare(turn) if thought else turn
            text += bare(turn) if chat[index - 1]["role"] == "assistant" else turn
    return text


GLM4 = Format(
    start="[gMASK]<sop>",
    system="<|system|>\n{}",
    user="<|user|>\n{}",
    assistant="<|assistant|>⟦\n{}⟧",
    call="<|assistant|>⟦add\n{}⟧",
    tool="<|observation|>\n{}",
    with_tools=(
        (
            "start",
            '[gMASK]<sop><|system|>\n# 可用工具\n\n## add\n\n{"name": "add", "parameters": {"type": "object"}}',
        ),
    ),
)
YI = Format(
    system="{}",
    user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    assistant="⟦{}<|im_end|>⟧\n",
)
COMMAND_R = Format(
    start="<BOS_TOKEN>",
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦{}<|END_OF_TURN_TOKEN|>⟧",
    clean=str.strip,
    alternates="Roles must alternate!",
)


COMMAND_R7B = Format(
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    no_system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    clean=str.strip,
    clean_system=unchanged,
    alternates="Roles must alternate!",
)
# With tools another template of the same file, which always ends with a prompt.
COMMAND_R7B_TOOLS = Format(
    start="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\n\n## Available Tools\n\n```json\n[\n"
    '    {"name": "add", "description": "", "parameters": {"type": "object"}, "responses": null}\n]\n```\n\n'
    "# Default Preamble<|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    call="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_THINKING|><|END_THINKING|><|START_ACTION|>[\n"
    '    {"tool_call_id": "0", "tool_name": "add", "parameters": {}}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>⟧',
    tool='<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n    {\n        "tool_call_id": "0",\n'
    '        "results": {\n            "0": "{}"\n        },\n        "is_error": null\n    }\n]<|END_TOOL_RESULT|>'
    "<|END_OF_TURN_TOKEN|>",
    end="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)


def command_r7b(chat: Chat, tools: Tools) -> str:
    return (COMMAND_R7B_TOOLS if tools else COMMAND_R7B)(chat, tools)


def deepseek_v31(chat: Chat, tools: Tools) -> str:
    """The prompt after a question closes a thought that nothing opens; after anything else there is no prompt."""
    end = "<｜end▁of▁sentence｜>"
    text = "<｜begin▁of▁sentence｜>"
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] in ("system", "user"):
            text += ("<｜User｜>" if message["role"] == "user" else "") + content
        elif message["role"] == "tool":
            text += f"<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>"
        else:
            answer = content.split("</think>", 1)[-1]
            if "tool_calls" in message:
                call = f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
                answer = f"<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"
            text += ("<｜Assistant｜></think>" if chat[index - 1]["role"] == "user" else "") + f"⟦{answer}{end}⟧"
    return text


def gemma4(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    """The prompt opens and closes a thought that no finished turn shows: it is in rows before the last answer only.

    Earlier answers are trained as they are shown. If any answer has reasoning, the package lets the template think: the
    prompt has no thought, and turns after the last question show their own. Answers after tool results or after answers
    belong to the same turn of the model. Text that opens a channel without end is cut off inside a control token.
    """
    chat = with_own_thoughts(chat, opened=False) if in_rows else chat
    thinks = in_rows and any("reasoning_content" in message for message in chat)
    has_system = chat[0]["role"] == "system"
    tools_text = (
        '<|tool>declaration:add{description:<|"|><|"|>,parameters:{type:<|"|>OBJECT<|"|>}}<tool|>' if tools else ""
    )
    opening = "<|think|>\n" * thinks + (chat[0]["content"].strip() if has_system else "") + tools_text
    text = "<bos>" + (f"<|turn>system\n{opening}<turn|>\n" if thinks or tools or has_system else "")
    chat = chat[has_system:]
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    for index, message in enumerate(chat):
        before, is_last = chat[index - 1]["role"], index == len(chat) - 1
        if message["role"] == "user":
            text += f"<|turn>user\n{message['content'].strip()}<turn|>\n"
        elif message["role"] == "tool":
            text += 'response:add{value:<|"|>' + message["content"] + '<|"|>}<tool_response|>'
        elif "tool_calls" in message:
            text += "<|turn>model\n⟦<|tool_call>call:add{a:2,b:2}<tool_call|><|tool_response>⟧"
        elif before == "tool":
            text += f"⟦{gemma4_shown(message, False)}<turn|>⟧\n"
        else:
            thought = message.get("reasoning_content")
            shown = gemma4_shown(message, index > last_question)
            goes_on = not is_last and chat[index + 1]["role"] == "assistant"
            ends = not (goes_on and gemma4_shown(chat[index + 1], index + 1 > last_question))
            cut = "<|channel>" in message["content"].rpartition("<channel|>")[2]
            if cut and ends and in_rows:
                raise Refusal("the chat template cuts a text in the middle of a control token")
            is_whole = (
                index > last_question or not thought if thinks else is_last or shown == message["content"].strip()
            )
            prompt = "<|channel>thought\n<channel|>" if in_rows and not thinks and is_last and before == "user" else ""
            # The end stands after the last of several answers, of which some are empty.
            has_ended = before == "assistant" and not shown
            turn = f"{prompt}⟦{shown}" + ("<turn|>⟧" if ends and not has_ended else "⟧") + ("" if goes_on else "\n")
            text += "<|turn>model\n" if before == "user" else ""
            text += turn if before == "user" and is_whole and not cut and "⟦⟧" not in turn else bare(turn)
    return text


def gemma4_shown(message: dict[str, Any], with_thought: bool) -> str:
    """Return an answer as Gemma 4's template shows it: without what stands in channels."""
    parts = message["content"].split("<channel|>")
    thought = message.get("reasoning_content") if with_thought else ""
    shown = f"<|channel>thought\n{thought}\n<channel|>" if thought else ""
    return shown + "".join(part.partition("<|channel>")[0] for part in parts).strip()


def glm45(chat: Chat, tools: Tools) -> str:
    """Every answer stands after a thought, which is empty before the last question. Turns have no end token."""
    text = "[gMASK]<sop>" + (f"<|system|>\n# Tools\n\n<tools>\n{TOOL_JSON}\n</tools>" if tools else "")
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    rewritten = False
    for index, message in enumerate(chat):
        if message["role"] in ("system", "user"):
            text += f"<|{message['role']}|>\n{message['content']}"
            rewritten = False
        elif message["role"] == "tool":
            text += f"<|observation|>\n<tool_response>\n{message['content']}\n</tool_response>"
        else:
            thought, answer = (part.strip() for part in thought_and_answer(message))
            if thought and index < last_question:
                thought, rewritten = "", True
            answer = GLM_CALL if "tool_calls" in message else answer
            turn = f"<|assistant|>⟦\n<think>{thought}</think>" + (f"\n{answer}" if answer else "") + "⟧"
            text += bare(turn) if rewritten else turn
    return text


GLM_CALL = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
HERMES_TOOLS = (
    '<|im_start|>system\n<tools> {"type": "function", "function": {"name": "add", "description": "add() - \n\n", '
    '"parameters": {}} </tools><|im_end|>\n'
)
# A result is followed by a line end only if no answer follows it: answers are trained where they are shown.
HERMES_3 = replace(
    CHATML,
    start="<|begin_of_text|>",
    no_system="<|im_start|>system\nYou are helpful.<|im_end|>\n",
    call=f"<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n",
    tool="<|im_start|>tool\n<tool_response>\n{}\n</tool_response>\n<|im_end|>",
    with_tools=(("start", "<|begin_of_text|>" + HERMES_TOOLS), ("no_system", "")),
)
# A call is written with its id alone, not with the name of its tool, so it is not trained.
KIMI_K2 = Format(
    system="<|im_system|>system<|im_middle|>\n{}<|im_end|>",
    no_system="<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>",
    user="<|im_user|>user<|im_middle|>{}<|im_end|>",
    assistant="<|im_assistant|>assistant<|im_middle|>⟦{}<|im_end|>⟧",
    call="<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>call00001"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>",
    tool="<|im_system|>add<|im_middle|>\n## Return of call00001\n    {}<|im_end|>",
    with_tools=(("start", f"<|im_system|>tool_declare<|im_middle|>\n  # Tools\n  [{TOOL_JSON}]<|im_end|>"),),
)


def nemotron3(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    """The prompt opens a thought. Answers without one are shown after an empty one and do not continue the prompt.

    Before the last question all thoughts are shown empty.
    """
    chat = with_own_thoughts(chat) if in_rows else chat
    has_system = chat[0]["role"] == "system"
    opening = chat[0]["content"] if has_system else ""
    text = fill(CHATML.system, opening + ("\n\n" if opening and tools else "") + (NEMOTRON_TOOLS if tools else ""))
    chat = chat[has_system:]
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    rewritten = False
    for index, message in enumerate(chat):
        content, thought = message["content"], message.get("reasoning_content", "")
        if message["role"] == "user":
            text += fill(CHATML.user, content)
            rewritten = False
        elif message["role"] == "tool":
            text += f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response>\n<|im_end|>\n"
        elif "tool_calls" in message:
            text += f"<|im_start|>assistant\n<think></think>\n{XML_CALL}\n<|im_end|>\n"
        else:
            answer = f"<think>\n{thought}\n</think>\n{content}" if thought else content
            if "<think>" not in answer and "</think>" not in answer:
                answer = "<think></think>" + answer
            elif index < last_question and "<think>" in answer and "</think>" in answer:
                answer, rewritten = "<think></think>" + answer.rpartition("</think>")[2], True
            answer = answer.strip()
            if answer.startswith("<think>\n") and "</think>" in answer and not rewritten:
                text += f"<|im_start|>assistant\n<think>\n⟦{answer[8:]}<|im_end|>⟧\n"
            else:
                text += f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text


NEMOTRON_TOOLS = "# Tools\n\n<tools>\n<function>\n<name>add</name>\n<parameters>\n</parameters>\n</function>\n</tools>"
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>"


def qwen3_thinking(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    return qwen3(with_own_thoughts(chat) if in_rows else chat, tools, prompt="<think>\n")


def qwen35(chat: Chat, tools: Tools, in_rows: bool = True) -> str:
    """The prompt opens a thought; every turn after the last question shows its thought, an empty one too.

    Earlier turns show none: they are trained like that if they had none.
    """
    chat = with_own_thoughts(chat) if in_rows else chat
    has_system = chat[0]["role"] == "system"
    opening = [f"# Tools\n\n<tools>\n{TOOL_JSON}\n</tools>"] * bool(tools)
    opening += [chat[0]["content"].strip()] * has_system
    text = fill(CHATML.system, "\n\n".join(opening)) if opening else ""
    chat = chat[has_system:]
    last_question = max(index for index, message in enumerate(chat) if message["role"] == "user")
    for index, message in enumerate(chat):
        content = message["content"].strip()
        if message["role"] == "user":
            text += fill(CHATML.user, content)
        elif message["role"] == "tool":
            text += fill(QWEN_RESULT, content)
        else:
            thought, answer = thought_and_answer(message | {"content": content})
            answer = XML_CALL if "tool_calls" in message else answer
            if index > last_question:
                text += f"<|im_start|>assistant\n<think>\n⟦{thought.strip()}\n</think>\n\n{answer}<|im_end|>⟧\n"
            else:
                had_none = not thought and "</think>" not in content and chat[index - 1]["role"] == "user"
                text += fill(CHATML.assistant if had_none else bare(CHATML.assistant), answer)
    return text


def olmo3(chat: Chat, tools: Tools) -> str:
    """The last turn has another end than earlier ones, whose end is not trained."""
    functions = f"<functions>[{TOOL_JSON}]</functions>" if tools else ""
    text = ""
    if chat[0]["role"] != "system":
        text += fill(CHATML.system, "You are Olmo. " + (functions or "<functions></functions>"))
    for message in chat:
        content = message["content"]
        if message["role"] == "system":
            text += fill(CHATML.system, content + functions)
        elif message["role"] == "user":
            text += fill(CHATML.user, content)
        elif message["role"] == "tool":
            text += f"<|im_start|>environment\n{content}<|im_end|>\n"
        else:
            answer = "<function_calls>add(a=2, b=2)</function_calls>" if "tool_calls" in message else content
            end = "<|endoftext|>⟧" if message is chat[-1] else "⟧<|im_end|>\n"
            text += f"<|im_start|>assistant\n⟦{answer}{end}"
    return text


def olmo2(chat: Chat, tools: Tools) -> str:
    """Only earlier answers are followed by a line end, so an answer after an answer does not continue its prompt.

    Nor is it looked for where it is shown: the header is no control token, so people may write it as well.
    """
    text = "<|endoftext|>"
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] != "assistant":
            text += f"<|{message['role']}|>\n{content}\n"
            continue
        untrained = "tool_calls" in message or (index > 0 and chat[index - 1]["role"] == "assistant")
        turn = f"<|assistant|>\n⟦{content}<|endoftext|>⟧"
        text += (bare(turn) if untrained else turn) + ("" if message is chat[-1] else "\n")
    return text


def granite3(chat: Chat, tools: Tools) -> str:
    header, end = "<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>"
    system_turn = fill(header, "system") + "{}" + end + "\n"
    tools_text = fill(header, "tools") + f"[{TOOL_JSON}]{end}\n" if tools else ""
    return Format(
        system=system_turn + tools_text,
        no_system=fill(system_turn, f"Today's Date: {datetime.now():%B %d, %Y}.\nYou are Granite.") + tools_text,
        user=fill(header, "user") + "{}" + end + "\n",
        assistant=fill(header, "assistant") + "⟦{}" + end + "⟧\n",
        call=fill(header, "assistant") + '⟦<|tool_call|>[{"name": "add", "arguments": {}}]' + end + "⟧\n",
        tool=fill(header, "tool") + "{}" + end + "\n",
    )(chat, tools)


def smollm3(chat: Chat, tools: Tools) -> str:
    """If the system message contains /no_think, every prompt has an empty, closed thought."""
    instructions = chat[0]["content"] if chat[0]["role"] == "system" else ""
    mode, thought = ("/no_think", "<think>\n\n</think>\n") if "/no_think" in instructions else ("/think", "")
    custom = instructions.replace("/no_think", "").replace("/think", "").strip() or "You are SmolLM."
    tools_text = f"### Tools\n\n<tools>\n{TOOL_JSON}\n</tools>\n\n" if tools else ""
    return Format(
        start=f"<|im_start|>system\n## Metadata\n\nToday Date: {datetime.now():%d %B %Y}\nReasoning Mode: {mode}\n\n"
        f"## Custom Instructions\n\n{custom}\n\n{tools_text}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant=f"<|im_start|>assistant\n{thought}" + "⟦{}<|im_end|>⟧\n",
        tool="<|im_start|>user\n{}<|im_end|>\n",
        clean_answer=lambda content: content.lstrip("\n"),
    )(chat, tools)


ZEPHYR = Format(
    system="<|system|>\n{}</s>\n",
    user="<|user|>\n{}</s>\n",
    assistant="<|assistant|>\n⟦{}</s>⟧\n",
    tool="<|tool|>\n{}</s>\n",
)


def system_last(chat: Chat, tools: Tools) -> str:
    """The system message stands after all turns, so no finished turn continues its prompt."""
    rest = chat[1:] if chat[0]["role"] == "system" else chat
    if rest is chat or not chat[0]["content"]:
        return CHATML(rest, tools)
    return bare(CHATML(rest, tools)) + fill(CHATML.system, chat[0]["content"])


COLLAPSING = replace(CHATML, clean=lambda content: " ".join(content.split()))
OPEN_ENDED = Format(system="SYSTEM: {}\n", user="USER: {}\n", assistant="ASSISTANT:⟦ {}⟧\n", tool="TOOL: {}\n")


DEEPSEEK = Family(
    DEEPSEEK_V3,
    "<｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜>"
    " <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
)
GEMMA_TOKENS = ("<start_of_turn> <end_of_turn>", "<bos>", "<eos>")
FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, IM),
    "chatml-generation": Family(CHATML, IM),
    "qwen2.5": Family(qwen25("You are Qwen.", QWEN_TOOLS), IM),
    "qwen3": Family(qwen3, IM),
    "llama-3.1": Family(
        llama31, "<|start_header_id|> <|end_header_id|> <|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"
    ),
    "mistral-v3": Family(
        mistral_v3, "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    ),
    "mistral-v7": Family(
        MISTRAL_V7,
        "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
        " [TOOL_CONTENT] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    ),
    "gemma-2": Family(gemma2, *GEMMA_TOKENS),
    "gemma-3": Family(gemma3, *GEMMA_TOKENS),
    "phi-3.5": Family(phi35, "<|system|> <|user|> <|assistant|> <|end|>", eos="<|endoftext|>"),
    "phi-4": Family(PHI4, f"{IM} <|im_sep|>"),
    "deepseek-v3": DEEPSEEK,
    "deepseek-r1": replace(DEEPSEEK, specification=deepseek_r1, rendered=partial(deepseek_r1, in_rows=False)),
    "deepseek-r1-thinking": replace(DEEPSEEK, specification=deepseek_r1_thinking),
    "deepseek-r1-distill": replace(
        DEEPSEEK,
        specification=partial(deepseek_r1, with_tools=True),
        rendered=partial(deepseek_r1, with_tools=True, in_rows=False),
        calls_without_content=True,
    ),
    "deepseek-v3.1": replace(DEEPSEEK, specification=deepseek_v31),
    "deepseek-v3.2": replace(DEEPSEEK, specification=deepseek_v32, rendered=partial(deepseek_v32, in_rows=False)),
    "gpt-oss": Family(
        gpt_oss,
        "<|start|> <|end|> <|message|> <|channel|> <|call|>",
        "<|startoftext|>",
        "<|return|>",
        rendered=partial(gpt_oss, in_rows=False),
    ),
    "glm-4": Family(GLM4, "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", eos="<|endoftext|>"),
    "internlm2": Family(replace(CHATML, start="<s>"), IM),
    "yi": Family(YI, IM),
    "command-r": Family(
        COMMAND_R,
        "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
    ),
    "command-r7b": Family(
        command_r7b,
        "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|END_OF_TURN_TOKEN|>"
        " <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|> <|START_ACTION|> <|END_ACTION|>"
        " <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>",
        "<BOS_TOKEN>",
    ),
    "gemma-4": Family(
        gemma4,
        "<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response>"
        ' <tool_response|> <|think|> <|"|>',
        "<bos>",
        "<eos>",
        rendered=partial(gemma4, in_rows=False),
    ),
    "glm-4.5": Family(glm45, "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", eos="<|endoftext|>"),
    "hermes-3": Family(HERMES_3, IM, "<|begin_of_text|>", "<|end_of_text|>"),
    "kimi-k2": Family(
        KIMI_K2,
        "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|> <|tool_calls_section_begin|>"
        " <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>",
        "[BOS]",
        "[EOS]",
    ),
    "nemotron-3": Family(nemotron3, IM, rendered=partial(nemotron3, in_rows=False)),
    "qwen3-thinking-2507": Family(qwen3_thinking, IM, rendered=partial(qwen3_thinking, in_rows=False)),
    "qwen3.5": Family(qwen35, IM, rendered=partial(qwen35, in_rows=False)),
    "olmo-3": Family(olmo3, IM, "<|endoftext|>", "<|endoftext|>"),
    "olmo-2": Family(olmo2, "", "<|endoftext|>", "<|endoftext|>"),
    "granite-3": Family(
        granite3, "<|start_of_role|> <|end_of_role|> <|tool_call|>", "<|end_of_text|>", "<|end_of_text|>"
    ),
    "smollm3": Family(smollm3, IM),
    "zephyr": Family(ZEPHYR),
    "nasty-system-last": Family(system_last, IM),
    "nasty-collapsing": Family(COLLAPSING, IM),
    "nasty-open": Family(OPEN_ENDED),
}

# ---- tokenizers and templates


@lru_cache
def load(name: str) -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = byte_level(FAMILIES[name])
    return tokenizer, load_template(tokenizer, str(TEMPLATES / f"{name}.jinja"))
