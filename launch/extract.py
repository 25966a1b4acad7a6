"""Extract a LoRA adapter from a tuned model and the base that it was tuned from.

python launch/extract.py --base base --model tuned --lora_r 32 --output_dir adapter
"""

import accel_llm.config.early

from rich.console import Console
from rich.progress import Progress

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options, shell_command
from accel_llm.config.tool_options import ExtractOptions as Options
from accel_llm.merge.extract import extract_adapter
from accel_llm.system.exit import run_script

SHOWN_LAYERS = 10  # those with the largest error


def main() -> None:
    options = parse_options(Options)
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("extracting")
        result = extract_adapter(options, lambda done, total: bar.update(task, completed=done, total=total))

    # The error of each layer, largest first.
    layers = sorted(result.errors.items(), key=lambda entry: -entry[1])
    console.print(f"{len(layers)} layers at rank {options.lora_r}; share of their change that is lost:")
    for name, error in layers[:SHOWN_LAYERS]:
        console.print(f"  {error:7.2%}  {name}")
    if len(layers) > SHOWN_LAYERS:
        console.print(f"  at most {layers[SHOWN_LAYERS][1]:.2%} in each of the other layers")

    for name, change in result.uncovered_changes.items():
        console.print(f"  not in the adapter, though changed by {change:.2%}: {name} (modules_to_save saves it whole)")
    command = shell_command("merge.py", adapter=result.folder, output_dir="merged")
    console.print(f"wrote {result.folder}; use it with: {command}")


if __name__ == "__main__":
    run_script(main)
