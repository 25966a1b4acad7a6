"""What the ledger says of real chats: every file with Qwen3's own template, and chats with tools with every template.

    python tests/proofs/ledger.py            print the tables
    python tests/proofs/ledger.py --write    into golden/ledger.md; some minutes on one core

It needs the folder ../shared/data beside the project. Nothing is refused for its losses (`max_lost: 1`).
"""

import argparse
import sys
import tempfile
from pathlib import Path

# isort: off
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "templates")]
from families import FAMILIES, load  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from accel_llm.chat.template import Template, load_template  # noqa: E402
from accel_llm.config.data_options import DataOptions  # noqa: E402
from accel_llm.data.ledger import Ledger  # noqa: E402
from accel_llm.data.pairs import PreferenceKind  # noqa: E402
from accel_llm.data.prepare import encode_conversations  # noqa: E402
from accel_llm.errors import ConfigError, DataError  # noqa: E402
# isort: on

DATA = ROOT.parent / "shared" / "data"
GOLDEN = ROOT / "tests" / "proofs" / "golden" / "ledger.md"
FOLDERS = ("instruct/*", "instruct/ms-swift/*", "preference/*")
WITH_TOOLS = ("instruct/glaive_toolcall_en_demo.json", "instruct/reason_tool_use_demo_50.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    own = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen3")
    files = [str(path.relative_to(DATA)) for folder in FOLDERS for path in sorted(DATA.glob(folder)) if path.is_file()]
    lines = ["# What the ledger says of real chats", "", "Written by `python tests/proofs/ledger.py --write`.", ""]
    lines += ["## Each file with Qwen3's own template", "", *table(own, load_template(own), files)]
    for name in FAMILIES:
        lines += ["", f"## {name}", "", *table(*load(name), WITH_TOOLS)]
    print("\n".join(lines))
    if args.write:
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(tokenizer: PreTrainedTokenizerFast, template: Template, files: tuple[str, ...] | list[str]) -> list[str]:
    """One line for each file: rows, trained tokens, and what was lost, left out, unread or remarked."""
    lines = [
        "| file | rows | trained tokens | lost | left out by the template | read by nothing, remarks |",
        "|" + "---|" * 6,
    ]
    for file in files:
        try:
            lines.append(line(file, encode(tokenizer, template, DATA / file)))
        except (ConfigError, DataError) as error:
            lines.append(f"| {file} | | | {str(error).replace(str(DATA) + '/', '').replace('|', '/')} | | |")
    return lines


def encode(tokenizer: PreTrainedTokenizerFast, template: Template, file: Path) -> Ledger:
    # As dpo.py reads pairs, or kto.py answers with a label.
    kind = PreferenceKind(labelled="kto" in file.name) if file.parent.name == "preference" else None
    with tempfile.TemporaryDirectory() as folder:
        options = DataOptions(
            train_files=[str(file)], cache_dir=folder, max_length=200_000, max_lost=1, on_bad_row="drop"
        )
        return encode_conversations(options, 0, tokenizer, template, preferences=kind).ledger


def line(file: str, ledger: Ledger) -> str:
    (amount,), (bins,) = ledger.inputs.values(), ledger.bins.values()
    lost = [f"{name}: {count['rows']:,} rows" for name, count in bins.items() if name != "trained"]
    lost += [f"{count:,} turns: {reason}" for reason, count in ledger.turns.items()]
    left_out = [f"{kind}: {count:,} rows" for kind, count in sorted(ledger.left_out.items())]
    said = [f"{name}: {unused.rows:,} rows" for name, unused in ledger.unused.items()]
    said += [f"{count:,} rows: {sentence}" for sentence, count in ledger.remarks.items()]
    cells = [
        f"{amount['rows']:,}",
        f"{bins.get('trained', {}).get('supervised', 0):,}",
        *map("; ".join, (lost, left_out, said)),
    ]
    return f"| {file} | {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    main()
