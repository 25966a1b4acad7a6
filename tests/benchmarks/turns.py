"""Compare the seconds that all prefixes of long conversations take: in parts (`accel_llm.chat.prefixes`) and anew.

python tests/benchmarks/turns.py [--turns N ...] [--direct N] FILE.jinja ...

A turn is a call and its result. "one question": all turns follow the first question; "many": every fourth message is a
question. Of each conversation the full text and two prefixes for each assistant turn are rendered, as
`accel_llm.chat.targets` does; "anew" is transformers' own render of each.

CPU seconds on one core of a shared machine, with the templates of Qwen3, Llama 3.1 8B Instruct and Hermes 2 Pro (tool
use). The work in Python and Jinja grows with the turns; copying the texts grows with their square, and is about a fifth
of the time at 1,600 turns.

                 one question                     many questions
    turns        100      400    1,600           100      400    1,600
    Qwen3        0.05     0.22     0.55          0.07     0.29     2.14
      anew       1.92    21.41                   2.22    56.28
    Llama 3.1    0.01     0.08     0.38          0.04     0.15     0.92
      anew       0.76    11.96                   1.43    20.35
    Hermes       0.01     0.09     0.32          0.07     0.10     0.36
      anew       0.69    12.70                   2.36    22.66
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.chat.loop_parts import compile_parts
from accel_llm.chat.prefixes import Prefixes

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
PARAMETERS = {
    "type": "object",
    "properties": {"town": {"type": "string", "description": "The town."}},
    "required": ["town"],
}
TOOL = {"name": "weather", "description": "Tells the weather in a town.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}] * 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--turns", nargs="*", type=int, default=[100, 400, 1600])
    parser.add_argument("--direct", type=int, default=400, help="the most turns that are rendered anew")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{'template':28}{'questions':>10}{'turns':>7}{'characters':>12}{'in parts':>10}{'growth':>8}{'anew':>10}")
    for file in args.files:
        for kind in ("one", "many"):
            before = None
            for turns in args.turns:
                before = measure(file, kind, turns, turns <= args.direct, before)


def measure(file: Path, kind: str, turns: int, direct: bool, before: float | None) -> float:
    """Print a line of the table. Returns the seconds in parts."""
    source, messages = file.read_text(encoding="utf-8"), conversation(turns, kind == "many")
    compile_parts(source)  # once for a template
    start = time.process_time()
    prefixes = Prefixes(source, VARIABLES, messages, TOOLS)
    sizes = render_all(messages, prefixes.render)
    seconds = time.process_time() - start
    growth = f"{seconds / before:.1f}x" if before else ""
    anew = ""
    if direct:
        start = time.process_time()

        def render(count: int, prompt: bool) -> str:
            options = {**VARIABLES, "tools": TOOLS, "add_generation_prompt": prompt}
            return render_jinja_template([messages[:count]], chat_template=source, **options)[0][0]

        if render_all(messages, render) != sizes:
            raise AssertionError("the texts differ")
        anew = f"{time.process_time() - start:.2f} s"
    name = file.stem if file.stem != "chat_template" else file.parent.name
    print(f"{name[:27]:28}{kind:>10}{turns:>7,}{sizes[0][0]:>12,}{seconds:>8.2f} s{growth:>8}{anew:>10}", flush=True)
    return seconds


def render_all(messages: list[dict[str, Any]], render: Callable[[int, bool], str]) -> list[tuple[int, str]]:
    """Render the conversation and its prefixes; return each text's length and end."""
    texts = [render(len(messages), False)]
    sizes = [(len(texts[0]), texts[0][-200:])]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            for text in (render(index + 1, False), render(index, True)):
                sizes.append((len(text), text[-200:]))
    return sizes


def conversation(turns: int, many_questions: bool) -> list[dict[str, Any]]:
    """Return a conversation of so many calls, each with its result."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in all these towns? " * 5}]
    for turn in range(turns):
        if many_questions and turn:
            messages.append({"role": "assistant", "content": "It is fine there."})
            messages.append({"role": "user", "content": "And in the next town?"})
        function = {"name": "weather", "arguments": {"town": f"Town {turn}"}}
        calls = [{"type": "function", "id": f"call{turn:05}", "function": function}]
        thought = "The weather tool knows."
        messages.append({"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": calls})
        result = '{"weather": "sunny", "temperature": 21}' + " and so on" * 20
        messages.append({"role": "tool", "name": "weather", "tool_call_id": f"call{turn:05}", "content": result})
    return messages


if __name__ == "__main__":
    main()
