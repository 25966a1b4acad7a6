"""Rearranges documents for fill-in-the-middle (Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the
Middle"): a model of code learns to write what stands between a prefix and a suffix.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from accel_llm.errors import ConfigError


class FimTokens(NamedTuple):
    """The special tokens before the prefix, before the suffix, and before the middle."""

    prefix: str
    suffix: str
    middle: str


# Of Qwen2.5-Coder and others, StarCoder and SmolLM, DeepSeek-Coder.
KNOWN_FIM_TOKENS = (
    FimTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    FimTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FimTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges a share `rate` of the documents, and of these a share `spm_rate` with the suffix first.

    Which documents and where they are cut depends on their text and `seed` alone.
    """

    tokens: FimTokens
    rate: float
    spm_rate: float
    seed: int

    def rearrange(self, text: str, digest: bytes) -> str | None:
        """Return the text with its middle at the end, or None if it stays as it is. `digest` is a hash of the text.

        PSM: prefix, suffix, middle, each behind its token. SPM (the second variant of the paper): the suffix, then the
        prefix and the middle as one text. A text that holds one of the tokens stays as it is.
        """
        drawn = hashlib.blake2b(digest, digest_size=32, key=self.seed.to_bytes(8, "little")).digest()
        chosen, order, first, second = (int.from_bytes(drawn[k : k + 8], "little") for k in range(0, 32, 8))
        if chosen >= self.rate * 2**64 or any(token in text for token in self.tokens):
            return None
        start, end = sorted((first % (len(text) + 1), second % (len(text) + 1)))
        prefix, middle, suffix = text[:start], text[start:end], text[end:]
        before, between, last = self.tokens
        if order < self.spm_rate * 2**64:
            return f"{before}{between}{suffix}{last}{prefix}{middle}"
        return f"{before}{prefix}{between}{suffix}{last}{middle}"


def find_fim_tokens(tokenizer: PreTrainedTokenizerFast) -> FimTokens:
    """Return the tokens for fill-in-the-middle that the tokenizer has.

    Raises:
        ConfigError: it has none, or they would take white space beside them away.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for tokens in KNOWN_FIM_TOKENS:
        found = [added[token] for token in tokens if token in added]
        if len(found) == len(tokens) and not any(token.lstrip or token.rstrip or token.single_word for token in found):
            return tokens
    names = ", ".join(KNOWN_FIM_TOKENS[0])
    raise ConfigError(
        f"fim_rate: the tokenizer {tokenizer.name_or_path} has no tokens for fill-in-the-middle, such as {names}; use one "
        "that has (prepare.py tokenizer --special_tokens), or leave fim_rate out."
    )
