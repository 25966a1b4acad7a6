"""Loads a tokenizer that Mistral published with a wrong pattern for splitting text into words, with the right one."""

import re
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from accel_llm.model.tokenizer_file import load_as_published
from accel_llm.system.launcher import process_rank

TWO_DIGITS = re.compile(r"\d\d+")


def load_with_right_pattern(name: str, **arguments: Any) -> PreTrainedTokenizerFast:
    """Load a tokenizer; if it is one of Mistral's that splits text by a wrong pattern, load it with the right one.

    Mistral's newer tokenizers (Tekken) were converted with the pattern of another family, which cuts words elsewhere
    than pretraining did. transformers 5.24 suspects each tokenizer of more than 100,000 tokens beside a Mistral config
    of an older release, and offers the right pattern. Other tokenizers stand beside such configs too, and the pattern
    would break them, so the vocabulary decides.
    """
    load = partial(load_as_published, name, **arguments)
    tokenizer = load(fix_mistral_regex=False)
    # transformers marks the tokenizers that it suspects.
    suspected = hasattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex")
    if not suspected or not _looks_like_tekken(tokenizer.get_vocab()):
        # Otherwise the flag would be in the tokenizer_config.json of every export.
        tokenizer.init_kwargs.pop("fix_mistral_regex", None)
        return tokenizer
    fixed = load(fix_mistral_regex=True)
    if _pattern(fixed) != _pattern(tokenizer) and process_rank() == 0:
        print(
            f"{name}: its tokenizer splits words by a wrong pattern, a known fault of Mistral's files; it is used and "
            "exported with the right one (fix_mistral_regex of transformers)",
            flush=True,
        )
    return fixed


def _looks_like_tekken(vocabulary: dict[str, int]) -> bool:
    """Return whether a vocabulary is byte-level (Ġ is a space) and has no token of two digits, as Mistral's pattern."""
    return "Ġ" in vocabulary and not any(TWO_DIGITS.fullmatch(token) for token in vocabulary)


def _pattern(tokenizer: PreTrainedTokenizerFast) -> bytes:
    return tokenizer.backend_tokenizer.pre_tokenizer.__getstate__()
