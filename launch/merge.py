"""Merge an adapter into its base model, giving a standalone model folder.

python launch/merge.py --adapter output --output_dir merged
"""

from rich.console import Console

from accel_llm.config import parse
from accel_llm.distributed import quiet
from accel_llm.errors import run
from accel_llm.merge import merge
from accel_llm.options import MergeOptions


def main() -> None:
    options = parse(MergeOptions)
    quiet()
    merged = merge(options)
    console = Console(highlight=False)
    console.print(f"merged {options.adapter} into {merged.base} ({merged.dtype})")
    if merged.difference is not None:
        console.print(f"verified: logits of the written model differ from base + adapter by {merged.difference:.1e}")
    console.print(f"wrote {merged.folder}; ask it with: python launch/chat.py --model {merged.folder}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
