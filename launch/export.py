"""Write a model as GGUF files for llama.cpp and Ollama, and prove that they serve it as it was trained.

python launch/export.py --model output --output_dir served
python launch/export.py --model merged --output_dir served --quantize f16 q8_0 q4_k_m
"""

import accel_llm.config.early

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ExportOptions as Options
from accel_llm.merge.export import ExportResult, export
from accel_llm.merge.serve import MODELFILE, describe_proof
from accel_llm.system.exit import run_script


def main() -> None:
    options = parse_options(Options)
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        result = export(
            options,
            lambda phase: bar.update(task, description=phase, completed=0, total=None),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    show_result(console, options, result)


def show_result(console: Console, options: Options, result: ExportResult) -> None:
    """Print what was written, how near it is to the model, and how to use it."""
    for note in result.served.notes:
        console.print(note)
    for file in result.served.files:
        console.print(f"wrote {file} ({file.stat().st_size / 1e6:,.1f} MB)")
    for sentence in describe_proof(result.served.proof):
        console.print(sentence)
    console.print(f"made of {result.source}; with Ollama: ollama create NAME -f {result.folder / MODELFILE}")


if __name__ == "__main__":
    run_script(main)
