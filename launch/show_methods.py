"""See every training method on the shape of Llama-2-7B: what it trains, what it costs, and what it is good for.

    python launch/show_methods.py
    python launch/show_methods.py --methods lora ia3 prefix --json

The figures follow from a model without data: bf16, one row of 2,048 tokens, activations recomputed, one GPU. They are
recorded for the methods of PEFT 0.21; those of a method that is new in the installed PEFT are found at once.
"""

import json
import sys
from difflib import get_close_matches

import accel_llm.config.early

from rich.console import Console
from rich.table import Table

from accel_llm.adapters.described import METHOD_DESCRIPTIONS, NOT_DESCRIBED
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import MethodsOptions as Options
from accel_llm.errors import ConfigError
from accel_llm.system.exit import run_script
from accel_llm.training.method_facts import MethodFacts, all_methods, find_facts, recorded_facts

MB, GB = 2**20, 2**30
HEADINGS = ("method", "trained", "MB", "GB", "LoRA", "pack", "merge", "bits", "good for", "paper")
LEGEND = (
    "trained: share of the weights; MB: their size in float32; GB: estimated memory of the GPU; LoRA: how much more than "
    "LoRA takes; pack: several documents in a row; merge: can be made a part of the weights; bits: of a quantized base"
)


def main() -> None:
    options = parse_options(Options)
    known, recorded = all_methods(), recorded_facts()
    for name in options.methods:
        if name not in known:
            guess = get_close_matches(name, known, 1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            raise ConfigError(f"methods: {name!r} is unknown; {hint}Allowed are {', '.join(known)}.")
    facts = {name: recorded.get(name) or find_facts(name) for name in options.methods or known}
    if options.json_lines:
        for name, of_method in facts.items():
            description = METHOD_DESCRIPTIONS.get(name, NOT_DESCRIBED)
            print(json.dumps({"method": name} | of_method._asdict() | description._asdict()))
        return
    # A terminal knows its width; elsewhere the table needs this one.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(methods_table(facts, (recorded.get("lora") or find_facts("lora")).memory))
    console.print(LEGEND, style="bright_black")
    for of_method in facts.values():
        if of_method.refused:
            console.print(f"refused: {of_method.refused}", soft_wrap=True, markup=False)


def methods_table(facts: dict[str, MethodFacts], memory_of_lora: int) -> Table:
    """Return a line for each method that is not refused."""
    table = Table(
        title="Methods on the shape of Llama-2-7B, with their default options", box=None, padding=(0, 1, 0, 0)
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[1:5] else "left", overflow="fold")
    for name, of_method in facts.items():
        if not of_method.refused:
            table.add_row(name, *figures(of_method, memory_of_lora), *METHOD_DESCRIPTIONS.get(name, NOT_DESCRIBED))
    return table


def figures(facts: MethodFacts, memory_of_lora: int) -> list[str]:
    """Return the cells of a method that stand between its name and its description."""
    bits = [bits for bits, allowed in (("4", facts.four_bit), ("8", facts.eight_bit)) if allowed]
    return [
        f"{100 * facts.share:.2g}%" if facts.share < 1e-3 else f"{facts.share:.2%}",
        f"{4 * facts.trained / MB:,.1f}" if 4 * facts.trained < 10 * MB else f"{4 * facts.trained / MB:,.0f}",
        f"{facts.memory / GB:.1f}" if facts.memory else "-",
        f"{(facts.memory - memory_of_lora) / GB:+.1f}" if facts.memory else "-",
        "yes" if facts.packed else "no",
        "yes" if facts.mergeable else "no",
        " ".join(bits) or "no",
    ]


if __name__ == "__main__":
    run_script(main)
