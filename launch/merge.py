"""Merge an adapter into its base model, giving a standalone model folder.

python launch/merge.py --adapter output --output_dir merged
python launch/merge.py --adapter output other --adapter_weights 0.7 0.3 --output_dir merged
python launch/merge.py --adapter output --base merged --unmerge --output_dir base
"""

import os

# Large tensors get huge pages: otherwise the system spends more time on allocating memory page by page than PEFT spends
# on merging. torch reads the variable, so it is set before the other imports.
os.environ["THP_MEM_ALLOC_ENABLE"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "1")

from pathlib import Path

import accel_llm.config.early

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options, shell_command
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.merge.merge import MergeResult, describe_base_errors, merge
from accel_llm.merge.serve import describe_proof
from accel_llm.report.card import exports_scores
from accel_llm.report.sharing import describe_failed_upload, share_export
from accel_llm.system.exit import run_script
from accel_llm.system.upload import upload_problems


def main() -> None:
    options = parse_options(MergeOptions)
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if options.push_to_hub:  # what would fail after the merge fails here
        raise_problems(upload_problems(str(options.hub_model_id), options.hub_private_repo))
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging")
        merged = merge(options, lambda done, total: bar.update(task, completed=done, total=total))
    show_result(console, options, merged)
    if options.push_to_hub:
        upload(console, merged.folder, str(options.hub_model_id), options.hub_private_repo)


def upload(console: Console, folder: Path, name: str, private: bool) -> None:
    """Upload the merged model, and say where it is or how to try again."""
    try:
        address = share_export(folder, name, private)
    except Exception as error:  # of the hub, of its library or of the disk
        raise ConfigError(describe_failed_upload(folder, name, private, error)) from error
    console.print(f"uploaded {folder} to {address}{' (private)' * private}")


def show_result(console: Console, options: MergeOptions, merged: MergeResult) -> None:
    """Print what was merged, how well it was verified, and how to use it."""
    for note in merged.notes:
        console.print(note)
    adapters, dtype = " + ".join(options.adapter), str(merged.dtype).removeprefix("torch.")
    action = f"took {adapters} out of" if options.unmerge else f"merged {adapters} into"
    console.print(f"{action} {merged.base} ({merged.modules} modules, {dtype})")

    # Verification of modules, then of whole models.
    if merged.largest_error is not None:
        console.print(f"verified: each module computes the same as before, within {merged.largest_error:.1e}")
    if "merged" in merged.differences:
        difference = merged.differences["merged"]
        console.print(f"verified: logits of the written model differ from base + adapter by {difference:.1e}")
    for sentence in describe_proof(merged.served) if merged.served else ():
        console.print(sentence)
    for base, sentence in describe_base_errors(merged).items():
        console.print(f"{base} base: {sentence}")
    if "merge_base" in options.model_fields_set and options.verify != "logits":
        console.print("to measure the error of both bases, original and dequantized, add: --verify logits")
    use = f"ask it with: {shell_command('chat.py', model=merged.folder)}"
    if exports_scores(merged.folder):
        names = {"model": merged.folder, "input_files": "FILE", "output_file": "predictions.jsonl"}
        use = f"let it score texts with: {shell_command('predict.py', **names)}"
    console.print(f"wrote {merged.folder}; {use}")


if __name__ == "__main__":
    run_script(main)
