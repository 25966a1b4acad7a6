"""Masks of every family of chat formats, compared with specifications written by hand: ⟦ and ⟧ enclose what is trained.

The specifications stand in `families`. They are themselves checked against complete texts (`LITERALS`).
"""

# ruff: noqa: RUF001 (DeepSeek's control tokens are written with a fullwidth bar)
import json
import re
from dataclasses import replace
from datetime import datetime

import pytest
from families import FAMILIES, TEMPLATES, load
from specification import (
    ALL_SHAPES,
    ARGUMENTS,
    CALL,
    MULTI,
    SHAPES,
    SINGLE,
    TOOL,
    TOOL_JSON,
    bare,
    check,
    check_any_conversation,
    compare,
    get_conversation,
    mark_trained,
    mutations,
)

from accel_llm.chat.template import load_template
from accel_llm.errors import DataError

# ---- complete texts that the specifications must give

TODAY = datetime.now()
LITERALS: dict[tuple[str, str], str] = {
    ("chatml", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("chatml", "consecutive"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nYou?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n"
    ),
    ("chatml-generation", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("chatml-generation", "markers"): (
        "<|im_start|>system\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_end|>\n"
        "<|im_start|>user\nsay <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦it <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n is<|im_end|>⟧\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen2.5", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen2.5", "tools"): (
        "<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n</tools><|im_end|>\n'
        '<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n'
        "</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n"
    ),
    ("qwen3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen3", "reasoning"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nSum.\n</think>\n\n4.<|im_end|>⟧\n"
    ),
    ("qwen3", "tools"): (
        '<|im_start|>system\n# Tools\n\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}\n</tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n'
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nFour.<|im_end|>⟧\n"
    ),
    ("llama-3.1", "system"): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {TODAY:%d %b %Y}\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦4.\n\nSure.<|eot_id|>⟧"
    ),
    ("llama-3.1", "tools"): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: "
        f"December 2023\nToday Date: {TODAY:%d %b %Y}\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nFunctions:\n\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n\n2+2?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Four.<|eot_id|>⟧"
    ),
    ("mistral-v3", "multi"): "<s>[INST] Hi[/INST]⟦ Hello.</s>⟧[INST] 2+2?[/INST]⟦ 4.\n\nSure.</s>⟧",
    ("mistral-v3", "system"): "<s>[INST] Hi[/INST] Hello.</s>[INST] 2+2?[/INST] 4.\n\nSure.</s>",
    ("mistral-v3", "tools, two questions"): (
        '<s>[INST] Hi[/INST] Hello.</s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}][/AVAILABLE_TOOLS][INST] 2+2?[/INST]⟦ 4.\n\nSure.</s>⟧'
    ),
    ("mistral-v7", "system"): (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]⟦Hello.</s>⟧[INST]2+2?[/INST]⟦4.\n\nSure.</s>⟧"
    ),
    ("mistral-v7", "tools"): (
        '<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        '[/AVAILABLE_TOOLS][INST]2+2?[/INST]⟦[TOOL_CALLS][{"name": "add", "arguments": {"a": 2, "b": 2}, "id": "call00001"}]</s>⟧'
        "[TOOL_RESULTS]call00001[TOOL_CONTENT]4[/TOOL_RESULTS]⟦Four.</s>⟧"
    ),
    ("gemma-2", "multi"): (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦4.\n\nSure.<end_of_turn>⟧\n"
    ),
    ("gemma-2", "unicode"): (
        "<bos><start_of_turn>user\né中😀 שלום<end_of_turn>\n<start_of_turn>model\n⟦👩‍🔬 naïve 中文。 e\u0301<end_of_turn>⟧\n"
    ),
    ("gemma-3", "system"): (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦4.\n\nSure.<end_of_turn>⟧\n"
    ),
    ("gemma-3", "spaces"): (
        "<bos><start_of_turn>user\n Be  brief. \n\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2 +  2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n"
    ),
    ("phi-3.5", "system"): (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4.\n\nSure.<|end|>⟧\n<|endoftext|>"
    ),
    ("phi-3.5", "empty system"): "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n<|endoftext|>",
    ("phi-4", "system"): (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello.<|im_end|>⟧<|im_start|>user<|im_sep|>2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦4.\n\nSure.<|im_end|>⟧"
    ),
    ("phi-4", "spaces"): (
        "<|im_start|>system<|im_sep|> Be  brief. \n<|im_end|><|im_start|>user<|im_sep|> \n Hi \n\n<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello.  \n<|im_end|>⟧<|im_start|>user<|im_sep|>\t2 +  2?\n<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦\n\n It is 4. \r\n\n\n<|im_end|>⟧"
    ),
    ("deepseek-v3", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>2+2?<｜Assistant｜>⟦4.\n\nSure.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3", "tools"): (
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
        '```json\n{"a": 2, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦Four.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-r1", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜>4.\n\nSure.<｜end▁of▁sentence｜>"
    ),
    ("deepseek-r1", "thoughts"): (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-r1", "reasoning"): (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-r1-thinking", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦\n</think>\n\n4.\n\nSure.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-r1-thinking", "thoughts"): (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧"
    ),
    ("gpt-oss", "system"): (
        f"<|start|>system<|message|>Current date: {TODAY:%Y-%m-%d}\n\nReasoning: medium<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Hello.⟧<|end|><|start|>user<|message|>2+2?<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>4.\n\nSure.<|return|>⟧"
    ),
    ("gpt-oss", "reasoning"): (
        f"<|start|>system<|message|>Current date: {TODAY:%Y-%m-%d}\n\nReasoning: medium<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Sum.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4.<|return|>⟧"
    ),
    ("gpt-oss", "tools"): (
        f"<|start|>system<|message|>Current date: {TODAY:%Y-%m-%d}\n\nReasoning: medium<|end|><|start|>developer<|message|># Tools"
        '\n\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}<|end|>'
        "<|start|>user<|message|>2+2?<|end|>"
        '<|start|>assistant⟦ to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>⟧'
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"4"<|end|>'
        "<|start|>assistant⟦<|channel|>final<|message|>Four.<|return|>⟧"
    ),
    ("glm-4", "system"): (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>⟦\nHello.⟧<|user|>\n2+2?<|assistant|>⟦\n4.\n\nSure.⟧"
    ),
    ("glm-4", "tools"): (
        '[gMASK]<sop><|system|>\n# 可用工具\n\n## add\n\n{"name": "add", "parameters": {"type": "object"}}'
        '<|user|>\n2+2?<|assistant|>⟦add\n{"a": 2, "b": 2}⟧<|observation|>\n4<|assistant|>⟦\nFour.⟧'
    ),
    ("internlm2", "system"): (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("internlm2", "empty system"): (
        "<s><|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    ),
    ("yi", "system"): (
        "Be brief.<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("yi", "consecutive"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_start|>user\nYou?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello.<|im_end|>⟧\n⟦Bye.<|im_end|>⟧\n"
    ),
    ("command-r", "system"): (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello.<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦4.\n\nSure.<|END_OF_TURN_TOKEN|>⟧"
    ),
    ("command-r", "spaces"): (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be  brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello.<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2 +  2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦It is 4.<|END_OF_TURN_TOKEN|>⟧"
    ),
    ("olmo-2", "system"): (
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n⟦Hello.<|endoftext|>⟧\n"
        "<|user|>\n2+2?\n<|assistant|>\n⟦4.\n\nSure.<|endoftext|>⟧"
    ),
    ("olmo-2", "consecutive"): (
        "<|endoftext|><|user|>\nHi\n<|user|>\nYou?\n<|assistant|>\n⟦Hello.<|endoftext|>⟧\n<|assistant|>\nBye.<|endoftext|>"
    ),
    ("granite-3", "multi"): (
        f"<|start_of_role|>system<|end_of_role|>Today's Date: {TODAY:%B %d, %Y}.\nYou are Granite.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Hello.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦4.\n\nSure.<|end_of_text|>⟧\n"
    ),
    ("granite-3", "tools"): (
        f"<|start_of_role|>system<|end_of_role|>Today's Date: {TODAY:%B %d, %Y}.\nYou are Granite.<|end_of_text|>\n"
        '<|start_of_role|>tools<|end_of_role|>[{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}]<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n'
        '<|start_of_role|>assistant<|end_of_role|>⟦<|tool_call|>[{"name": "add", "arguments": {"a": 2, "b": 2}}]<|end_of_text|>⟧\n'
        "<|start_of_role|>tool<|end_of_role|>4<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Four.<|end_of_text|>⟧\n"
    ),
    ("smollm3", "system"): (
        f"<|im_start|>system\n## Metadata\n\nToday Date: {TODAY:%d %B %Y}\nReasoning Mode: /think\n\n"
        "## Custom Instructions\n\nBe brief.\n\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("smollm3", "no_think"): (
        f"<|im_start|>system\n## Metadata\n\nToday Date: {TODAY:%d %B %Y}\nReasoning Mode: /no_think\n\n"
        "## Custom Instructions\n\nYou are SmolLM.\n\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("zephyr", "system"): (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n"
        "<|user|>\n2+2?</s>\n<|assistant|>\n⟦4.\n\nSure.</s>⟧\n"
    ),
    ("zephyr", "thoughts"): (
        "<|user|>\nHi</s>\n<|assistant|>\n⟦<think>\nPolite.\n</think>\n\nHello.</s>⟧\n"
        "<|user|>\n2+2?</s>\n<|assistant|>\n⟦<think>\nSum.\n</think>\n\n4.</s>⟧\n"
    ),
    ("command-r7b", "system"): (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "<|START_RESPONSE|>⟦Hello.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "<|START_RESPONSE|>⟦4.\n\nSure.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
    ),
    ("command-r7b", "tools"): (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\n\n## Available Tools\n\n```json\n[\n"
        '    {"name": "add", "description": "", "parameters": {"type": "object"}, "responses": null}\n]\n```\n\n'
        "# Default Preamble<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_THINKING|><|END_THINKING|><|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 2, "b": 2}}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>⟧'
        '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n    {\n        "tool_call_id": "0",\n'
        '        "results": {\n            "0": "4"\n        },\n        "is_error": null\n    }\n]<|END_TOOL_RESULT|>'
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "⟦<|START_RESPONSE|>Four.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    ("deepseek-r1-distill", "reasoning"): (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-r1-distill", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜>4.\n\nSure.<｜end▁of▁sentence｜>"
    ),
    ("deepseek-r1-distill", "tools"): (
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
        '```json\n{"a": 2, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜>'
        "<｜tool▁outputs▁end｜>⟦Four.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3.1", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜></think>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>2+2?<｜Assistant｜></think>⟦4.\n\nSure.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3.1", "tools"): (
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜></think>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
        '{"a": 2, "b": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧<｜tool▁output▁begin｜>4<｜tool▁output▁end｜>'
        "⟦Four.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3.2", "system"): (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜></think>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>2+2?<｜Assistant｜><think></think>⟦4.\n\nSure.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3.2", "reasoning"): (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>⟦Sum.</think>4.<｜end▁of▁sentence｜>⟧"
    ),
    ("deepseek-v3.2", "tools"): (
        '<｜begin▁of▁sentence｜>## Tools\n\n<functions>\n{"name": "add", "parameters": {"type": "object"}}\n</functions>\n'
        "<｜User｜>2+2?<｜Assistant｜></think>⟦\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls><｜end▁of▁sentence｜>⟧\n\n<function_results>\n<result>4</result>\n</function_results>"
        "\n\n<think></think>⟦Four.<｜end▁of▁sentence｜>⟧"
    ),
    ("gemma-4", "system"): (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello.<turn|>⟧\n"
        "<|turn>user\n2+2?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦4.\n\nSure.<turn|>⟧\n"
    ),
    ("gemma-4", "reasoning"): (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n"
        "<|turn>user\n2+2?<turn|>\n<|turn>model\n⟦<|channel>thought\nSum.\n<channel|>4.<turn|>⟧\n"
    ),
    ("gemma-4", "tools"): (
        '<bos><|turn>system\n<|tool>declaration:add{description:<|"|><|"|>,parameters:{type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        "<|turn>user\n2+2?<turn|>\n<|turn>model\n⟦<|tool_call>call:add{a:2,b:2}<tool_call|><|tool_response>⟧"
        'response:add{value:<|"|>4<|"|>}<tool_response|>⟦Four.<turn|>⟧\n'
    ),
    ("glm-4.5", "reasoning"): (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello."
        "<|user|>\n2+2?<|assistant|>⟦\n<think>Sum.</think>\n4.⟧"
    ),
    ("glm-4.5", "tools"): (
        '[gMASK]<sop><|system|>\n# Tools\n\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}\n</tools><|user|>\n2+2?<|assistant|>⟦\n<think></think>\n<tool_call>add\n'
        "<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>⟧"
        "<|observation|>\n<tool_response>\n4\n</tool_response><|assistant|>⟦\n<think></think>\nFour.⟧"
    ),
    ("hermes-3", "multi"): (
        "<|begin_of_text|><|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("hermes-3", "tools"): (
        '<|begin_of_text|><|im_start|>system\n<tools> {"type": "function", "function": {"name": "add", "description": '
        '"add() - \n\n", "parameters": {}} </tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n'
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\n4\n</tool_response>\n<|im_end|><|im_start|>assistant\n⟦Four.<|im_end|>⟧\n"
    ),
    ("kimi-k2", "system"): (
        "<|im_system|>system<|im_middle|>\nBe brief.<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦Hello.<|im_end|>⟧<|im_user|>user<|im_middle|>2+2?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦4.\n\nSure.<|im_end|>⟧"
    ),
    ("kimi-k2", "tools"): (
        '<|im_system|>tool_declare<|im_middle|>\n  # Tools\n  [{"type": "function", "function": {"name": "add", '
        '"parameters": {"type": "object"}}}]<|im_end|><|im_system|>system<|im_middle|>You are Kimi.<|im_end|>'
        "<|im_user|>user<|im_middle|>2+2?<|im_end|><|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
        '<|tool_call_begin|>call00001<|tool_call_argument_begin|>{"a": 2, "b": 2}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|><|im_system|>add<|im_middle|>\n## Return of call00001\n    4<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦Four.<|im_end|>⟧"
    ),
    ("nemotron-3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>Hello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>4.\n\nSure.<|im_end|>\n"
    ),
    ("nemotron-3", "reasoning"): (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦Sum.\n</think>\n4.<|im_end|>⟧\n"
    ),
    ("qwen3-thinking-2507", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen3-thinking-2507", "reasoning"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦Sum.\n</think>\n\n4.<|im_end|>⟧\n"
    ),
    ("qwen3.5", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("qwen3.5", "tools"): (
        '<|im_start|>system\n# Tools\n\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}\n</tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n'
        "⟦\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦\n</think>\n\nFour.<|im_end|>⟧\n"
    ),
    ("olmo-3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.⟧<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|endoftext|>⟧"
    ),
    ("olmo-3", "tools"): (
        '<|im_start|>system\nYou are Olmo. <functions>[{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}]</functions><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n'
        "<|im_start|>assistant\n⟦<function_calls>add(a=2, b=2)</function_calls>⟧<|im_end|>\n"
        "<|im_start|>environment\n4<|im_end|>\n<|im_start|>assistant\n⟦Four.<|endoftext|>⟧"
    ),
    ("nasty-system-last", "system"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4.\n\nSure.<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n"
    ),
    ("nasty-system-last", "multi"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|im_end|>⟧\n"
    ),
    ("nasty-collapsing", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4. Sure.<|im_end|>⟧\n"
    ),
    ("nasty-collapsing", "spaces"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    ),
    (
        "nasty-open",
        "system",
    ): "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:⟦ Hello.⟧\nUSER: 2+2?\nASSISTANT:⟦ 4.\n\nSure.⟧\n",
    ("nasty-open", "consecutive"): "USER: Hi\nUSER: You?\nASSISTANT:⟦ Hello.⟧\nASSISTANT:⟦ Bye.⟧\n",
}

# ---- tests


def test_every_template_file_is_a_family_with_literals() -> None:
    assert sorted(path.stem for path in TEMPLATES.glob("*.jinja")) == sorted(FAMILIES)
    for name in FAMILIES:
        assert sum(family == name for family, _ in LITERALS) >= 2


def test_tool_json_is_what_the_shapes_hold() -> None:
    assert (json.dumps(TOOL), json.dumps(CALL["function"]["arguments"])) == (TOOL_JSON, ARGUMENTS)  # type: ignore[index]


@pytest.mark.parametrize(("name", "shape"), LITERALS)
def test_specifications_give_the_literals(name: str, shape: str) -> None:
    specification = FAMILIES[name].specification
    assert specification(*get_conversation(shape, specification)) == LITERALS[name, shape]


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_masks(name: str, shape: str) -> None:
    family = FAMILIES[name]
    check(*load(name), family.specification, shape, None, family.rendered, family.calls_without_content)


REFUSED = {
    ("gemma-2", "system"): "System role not supported",
    ("gemma-2", "consecutive"): "Roles must alternate!",
    ("gemma-2", "tools"): "Roles must alternate!",
    ("gemma-3", "consecutive"): "Roles must alternate!",
    ("command-r", "consecutive"): "Roles must alternate!",
    ("mistral-v3", "consecutive"): "After the system message, user and assistant take turns!",
    ("mistral-v7", "consecutive"): "After the system message, user and assistant take turns!",
}


@pytest.mark.parametrize(("name", "shape"), REFUSED)
def test_a_refusal_has_the_words_of_the_template(name: str, shape: str) -> None:
    chat, tools = SHAPES[shape]
    with pytest.raises(DataError, match=re.escape(REFUSED[name, shape])):
        load(name)[1].encode(chat, tools=tools)


# Rows with `split_turns`: the whole conversation, then each turn that it shows in another way than it was generated.
SPLIT: dict[tuple[str, str], list[str]] = {
    ("qwen3", "multi"): [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n4.\n\nSure.<|im_end|>⟧\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n",
    ],
    ("qwen3", "reasoning"): [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nSum.\n</think>\n\n4.<|im_end|>⟧\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\nPolite.\n</think>\n\nHello.<|im_end|>⟧\n",
    ],
    ("mistral-v3", "tools, two questions"): [
        '<s>[INST] Hi[/INST] Hello.</s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}][/AVAILABLE_TOOLS][INST] 2+2?[/INST]⟦ 4.\n\nSure.</s>⟧',
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        "[/AVAILABLE_TOOLS][INST] Hi[/INST]⟦ Hello.</s>⟧",
    ],
    ("deepseek-r1-thinking", "thoughts"): [
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n⟦Polite.\n</think>\n\nHello.<｜end▁of▁sentence｜>⟧",
    ],
    ("deepseek-r1", "reasoning"): [
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n⟦Sum.\n</think>\n\n4.<｜end▁of▁sentence｜>⟧",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n⟦Polite.\n</think>\n\nHello.<｜end▁of▁sentence｜>⟧",
    ],
    ("deepseek-v3.2", "multi"): [
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think></think>⟦4.\n\nSure.<｜end▁of▁sentence｜>⟧",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think></think>⟦Hello.<｜end▁of▁sentence｜>⟧",
    ],
    ("gemma-4", "multi"): [
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n"
        "<|turn>user\n2+2?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦4.\n\nSure.<turn|>⟧\n",
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦Hello.<turn|>⟧\n",
    ],
    ("nemotron-3", "reasoning"): [
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦Sum.\n</think>\n4.<|im_end|>⟧\n",
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦Polite.\n</think>\nHello.<|im_end|>⟧\n",
    ],
    ("olmo-3", "multi"): [
        "<|im_start|>system\nYou are Olmo. <functions></functions><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦4.\n\nSure.<|endoftext|>⟧",
        "<|im_start|>system\nYou are Olmo. <functions></functions><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|endoftext|>⟧",
    ],
    ("gpt-oss", "reasoning"): [
        f"<|start|>system<|message|>Current date: {TODAY:%Y-%m-%d}\n\nReasoning: medium<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Sum.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4.<|return|>⟧",
        f"<|start|>system<|message|>Current date: {TODAY:%Y-%m-%d}\n\nReasoning: medium<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Polite.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|return|>⟧",
    ],
}


@pytest.mark.parametrize(("name", "shape"), SPLIT)
def test_split_turns_trains_every_turn_in_its_own_context(name: str, shape: str) -> None:
    tokenizer, template = load(name)
    chat, tools = SHAPES[shape]
    encoding = template.encode(chat, tools=tools, split_turns=True)
    assert [mark_trained(tokenizer, row) for row in encoding.rows] == SPLIT[name, shape]
    assert (encoding.lost, encoding.shown_as_history) == ({}, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_split_turns_changes_nothing_where_history_is_kept(name: str) -> None:
    template = load(name)[1]
    for shape in SHAPES:
        chat, tools = SHAPES[shape]
        try:
            encoding = template.encode(chat, tools=tools)
        except DataError:
            continue
        split = template.encode(chat, tools=tools, split_turns=True)
        if split.lost == encoding.lost and not encoding.shown_as_history:
            assert split == encoding
        assert split.lost.items() <= encoding.lost.items()


def test_turns_that_history_closes_in_another_way_are_counted() -> None:
    for name, count in (("gpt-oss", 1), ("olmo-3", 1), ("phi-4", 0)):
        encoding = load(name)[1].encode(MULTI)
        assert (encoding.lost, encoding.shown_as_history, len(encoding.rows)) == ({}, count, 1)


def test_a_thought_that_enable_thinking_closes_in_the_prompt_is_not_trained() -> None:
    tokenizer = load("qwen3")[0]
    path = str(TEMPLATES / "qwen3.jinja")
    by_default, off = (
        load_template(tokenizer, path),
        load_template(tokenizer, path, variables={"enable_thinking": False}),
    )
    question = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for template, expected in [
        (by_default, question + "⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n"),
        (off, question + "<think>\n\n</think>\n\n⟦Hello.<|im_end|>⟧\n"),
    ]:
        (row,) = template.encode(SINGLE).rows
        assert mark_trained(tokenizer, row) == expected


# ---- negative controls: an error of one character or one token is noticed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_expectation_is_noticed(name: str) -> None:
    tokenizer, template = load(name)
    expected, encoding = FAMILIES[name].specification(MULTI, None), template.encode(MULTI)
    compare(tokenizer, template, MULTI, expected, encoding)
    for mutation in mutations(expected, template.turn_end).values():
        assert bare(mutation) == bare(expected)
        with pytest.raises(AssertionError):
            compare(tokenizer, template, MULTI, mutation, encoding)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"deepseek-r1", "deepseek-r1-distill", "nemotron-3"}))
def test_a_wrong_mask_is_noticed(name: str) -> None:
    tokenizer, template = load(name)
    expected = FAMILIES[name].specification(MULTI, None)
    encoding = template.encode(MULTI)
    (row,) = encoding.rows
    trained = [index for index, label in enumerate(row.labels) if label != -100]
    first, last = trained[0], trained[-1]
    after = [last + 1] if template.turn_end and last + 1 < len(row.labels) else []
    for index in [0, first - 1, first, last, *after]:
        labels = list(row.labels)
        labels[index] = -100 if labels[index] != -100 else row.input_ids[index]
        with pytest.raises(AssertionError):
            compare(tokenizer, template, MULTI, expected, replace(encoding, rows=[replace(row, labels=labels)]))


# ---- random conversations


@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation(name: str) -> None:
    # Qwen3 strips an answer only while it is the last one, so an answer that begins with whitespace may be lost.
    check_any_conversation(FAMILIES[name], *load(name), examples=20, may_lose=name == "qwen3")
