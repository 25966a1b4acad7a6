"""Merge an adapter into its base model, giving a standalone model folder.

python launch/merge.py --adapter output --output_dir merged
python launch/merge.py --adapter output other --adapter_weights 0.7 0.3 --output_dir merged
python launch/merge.py --adapter output --base merged --unmerge --output_dir base
"""

import os

from accel_llm.backend.accelerator import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import MergeOptions
from accel_llm.merge.merge import describe_base_errors, merge
from accel_llm.merge.model_card import push_folder
from accel_llm.system.exit import run_script

# Read when torch is imported: large tensors get huge pages, or the system spends more time on handing out memory, page by
# page, than PEFT spends on merging.
os.environ["THP_MEM_ALLOC_ENABLE"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "1")

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn


def main() -> None:
    options = parse_options(MergeOptions)
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging")
        merged = merge(options, lambda done, total: bar.update(task, completed=done, total=total))
    for note in merged.notes:
        console.print(note)
    what = "took {} out of" if options.unmerge else "merged {} into"
    dtype = str(merged.dtype).removeprefix("torch.")
    console.print(f"{what.format(' + '.join(options.adapter))} {merged.base} ({merged.modules} modules, {dtype})")
    if merged.worst is not None:
        console.print(f"verified: each module computes what it did with its adapter, within {merged.worst:.1e}")
    if "merged" in merged.differences:
        difference = merged.differences["merged"]
        console.print(f"verified: logits of the written model differ from base + adapter by {difference:.1e}")
    for way, sentence in describe_base_errors(merged).items():
        console.print(f"{way} base: {sentence}")
    if "merge_base" in options.model_fields_set and options.verify != "logits":
        console.print("what either base costs, original or dequantized, is told with: --verify logits")
    console.print(f"wrote {merged.folder}; ask it with: python launch/chat.py --model {merged.folder}")
    if options.push_to_hub:
        console.print(f"uploaded to {push_folder(merged.folder, options.push_to_hub)}")


if __name__ == "__main__":
    run_script(main)
