"""Learns a byte-level BPE tokenizer from text, with special tokens and a chat template."""

from collections.abc import Iterator
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template_source import read_template
from accel_llm.config.corpus_options import TokenizerOptions
from accel_llm.config.text_options import with_text_column
from accel_llm.data.chunk_tokenizer import CL100K
from accel_llm.data.formats import Document, parse_row
from accel_llm.data.sources import as_source, problems_of_sources, read_source
from accel_llm.errors import ConfigError, DataError, raise_problems

END_OF_DOCUMENT = "<|endoftext|>"
TOKENS_OF_CHATML = ["<|im_start|>", "<|im_end|>"]


def learn_tokenizer(options: TokenizerOptions) -> PreTrainedTokenizerFast:
    """Learn a tokenizer from the texts of `train_files`; each byte is a token, so any text comes back as it was.

    Texts are split by the pattern of cl100k, which Llama 3 has too; llama.cpp and vLLM know it.

    Raises:
        ConfigError: a source is missing, the chat template cannot be read, or the texts have fewer pairs than `vocab_size` asks for.
        DataError: a row holds no text.
    """
    raise_problems(problems_of_sources("train_files", options.train_files))
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(CL100K), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    special = [
        END_OF_DOCUMENT,
        *(TOKENS_OF_CHATML if options.chat_template == "chatml" else []),
        *options.special_tokens,
    ]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_read_texts(options), trainer)
    if backend.get_vocab_size() < options.vocab_size:
        raise ConfigError(
            f"vocab_size: {options.vocab_size:,} tokens are more than the texts give ({backend.get_vocab_size():,}, with "
            f"min_frequency {options.min_frequency}); give more text, or lower one of the two."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        additional_special_tokens=[token for token in special if token != END_OF_DOCUMENT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read_template(tokenizer, options.chat_template).text
    return tokenizer


def _read_texts(options: TokenizerOptions) -> Iterator[str]:
    columns = with_text_column(options.columns, options.text_column)
    sources = [as_source(place) for place in options.train_files]
    rows = ((source, row) for source in sources for row in read_source(source))
    for source, row in islice(rows, options.limit_rows):
        parsed = parse_row(row.fields, source.data_format or options.data_format, {**columns, **source.columns})
        if not isinstance(parsed, Document):
            raise DataError(f"{row.file}, row {row.number}: found no plain text; give rows with a column text.")
        yield parsed.text
