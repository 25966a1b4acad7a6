"""Prepare a corpus ahead of time, without GPU and process group: tokenized, without duplicates, packed, memory-mapped.

    python launch/prepare.py corpus --tokenizer_name Qwen/Qwen2.5-1.5B --train_files texts --output_dir corpus
    python launch/prepare.py corpus --tokenizer_name Qwen/Qwen2.5-1.5B --train_files texts --output_dir corpus --part 3/64
    python launch/prepare.py seal corpus
    python launch/prepare.py tokenizer --train_files texts --vocab_size 32768 --output_dir tokenizer

The first word says what is done. `corpus` prepares text; with --part it does one share of it, on any machine, and `seal`
makes one corpus of all parts. Then every training script reads it: --train_files corpus. What was killed goes on when the
same command is given again, and what is prepared already is used. `tokenizer` learns a tokenizer from text.
"""

import sys
from pathlib import Path

import accel_llm.config.early

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options, shell_command
from accel_llm.config.corpus_options import CorpusOptions, SealOptions, TokenizerOptions
from accel_llm.data.corpus_build import check_sources, prepare_part
from accel_llm.data.corpus_seal import seal_corpus
from accel_llm.data.corpus_tokenizer import learn_tokenizer
from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.report import display
from accel_llm.system.exit import run_script
from accel_llm.system.folders import atomic_output, check_output_dir

Options = CorpusOptions
SCRIPTS = {"corpus": CorpusOptions, "seal": SealOptions, "tokenizer": TokenizerOptions}


def main() -> None:
    step = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in SCRIPTS else "corpus"
    options = parse_options(SCRIPTS[step], sys.argv[1:], SCRIPTS[step].script_defaults)
    quiet_libraries()
    if isinstance(options, SealOptions):
        seal([Path(folder) for folder in options.folders], options.output_dir, options.max_lost)
    elif isinstance(options, TokenizerOptions):
        learn(options)
    elif isinstance(options, CorpusOptions):
        prepare(options)


def prepare(options: CorpusOptions) -> None:
    """Prepare the part that the options name; if it is all there is, seal it at once."""
    check_sources(options)
    tokenizer = load_tokenizer(options.tokenizer_name, options.revision, options.trust_remote_code)
    pieces, new = prepare_part(options, tokenizer)
    print(f"part {options.part}: {pieces:,} pieces, of which {pieces - new:,} were prepared before")
    if options.share.count == 1:
        seal([Path(options.output_dir)], options.output_dir, options.max_lost)
    else:
        print(f"when all {options.share.count} parts are done: python launch/prepare.py seal {options.output_dir}")


def seal(folders: list[Path], output_dir: str | None, max_lost: float | None) -> None:
    """Make one corpus of the parts in `folders`, and say what is in it."""
    output = Path(output_dir) if output_dir else folders[0]
    sealed = seal_corpus(folders, output, max_lost)
    display.show_ledger(sealed.ledger)
    print(
        f"{output}: {sealed.documents:,} documents, {sealed.tokens:,} tokens in {sealed.packed_rows:,} packed rows that "
        f"are {sealed.fill:.2%} full"
    )
    print(f"train on it: {shell_command('pretrain.py', train_files=output)} ...")


def learn(options: TokenizerOptions) -> None:
    """Learn a tokenizer, and say what it has."""
    output = Path(options.output_dir)
    check_output_dir(output, [], options.overwrite_output_dir, "tokenizer.json")
    tokenizer = learn_tokenizer(options)
    with atomic_output(output) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{output}: {len(tokenizer):,} tokens; {tokenizer.eos_token} ends a document")
    print(f"prepare a corpus with it: {shell_command('prepare.py')} corpus --tokenizer_name {output} ...")


if __name__ == "__main__":
    run_script(main)
