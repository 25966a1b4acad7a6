"""How many bytes of text the tokens of rows stand for, so that losses under different tokenizers can be compared."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.targets import IGNORED
from accel_llm.data.rows import Rows

_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's token of a byte
_SPACE = "\u2581"  # what SentencePiece writes for a space
# Texts whose bytes the tokens must add up to: case, spaces, line ends, accents, full width, other scripts, emoji.
BYTE_PROBES = (
    *("a", "A  b\tc\n\n  d\r\n", "caf\u00e9 na\u00efve \u2014 \u201cquoted\u201d\u2026 1,234.5%", "x = {'k': [1]}  # \u00b2 \ufb01"),
    *("\u4f60\u597d\uff0c\u4e16\u754c\uff01\uff11\uff12", "\u3053\u3093 \u0441\u043b\u043e\u0432\u043e", "\U0001f469\u200d\U0001f52c \U0001f600\U0001d538", "\u0627\u0644\u0639 \u0928\u092e \ud55c\uad6d"),
)  # fmt: skip


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token, int64 [ids]; and those that are added in front of a text, which follow `first_ids`."""

    of_token: np.ndarray
    first_ids: tuple[int, ...]  # of every text: the token of its begin, or none
    added: int  # bytes of the space that SentencePiece puts before the first word
    unknown: int  # the id of text that has no token; -1: there is none


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes | None:
    """Return the bytes of each token, if they add up to the bytes of a text; else None.

    They do for byte-level BPE and for SentencePiece with tokens for single bytes. They do not where a tokenizer drops
    spaces or lowers capitals (WordPiece), or writes other characters in place of some (NFKC). The tokens that begin and
    end a text have no bytes, other added tokens those of their name.
    """
    size = _sizes(tokenizer)
    if size is None:
        return None
    ids = tokenizer.encode("a")
    first_ids = tuple(ids[:1]) if ids[:1] == [tokenizer.bos_token_id] else ()
    unknown = tokenizer.unk_token_id
    if not isinstance(unknown, int) or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        unknown = -1
    known = TokenBytes(size, first_ids, int(size[ids].sum()) - 1, unknown)
    return known if all(_is_exact(known, tokenizer, text) for text in BYTE_PROBES) else None


def _sizes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Return the bytes of each token as the decoder writes it, int64 [ids]; None if the decoder is of no known kind."""
    backend: Any = tokenizer.backend_tokenizer
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) if "ByteLevel" in kinds else set()
    for token, number in vocabulary.items():
        if alphabet and alphabet.issuperset(token):
            sizes[number] = len(token)  # one letter of this alphabet for each byte
        elif not alphabet and _ONE_BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace(_SPACE, " ").encode("utf-8", "surrogatepass"))
    for number, added in tokenizer.added_tokens_decoder.items():
        sizes[number] = len(added.content.encode())
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(number, int):
            sizes[number] = 0
    return sizes


def _is_exact(known: TokenBytes, tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    ids = tokenizer.encode(text)
    return known.unknown not in ids and int(known.of_token[ids].sum()) - known.added == len(text.encode())


def label_bytes(rows: Rows, known: TokenBytes) -> np.ndarray | None:
    """Return for each row the bytes of its labelled tokens, int64 [rows]; None if some of them are of unknown text.

    A row may be a piece of a text, cut at any token: what is counted is what its labels predict, to the byte. So the
    first token of a row, which no token predicts, does not count, neither in the loss nor here.
    """
    trained = np.asarray(rows.labels) != IGNORED
    ids = np.asarray(rows.input_ids)
    if (ids[trained] == known.unknown).any() or not len(rows):
        return None
    starts = rows.offsets[:-1]
    counts = np.add.reduceat(np.where(trained, known.of_token[ids], 0), starts)
    # The added space is in the first token behind the one that begins a text; without that one, it is in no label.
    if known.added and known.first_ids:
        follows = np.minimum(starts + 1, len(ids) - 1)
        counts -= known.added * ((ids[starts] == known.first_ids[0]) & (rows.lengths > 1) & trained[follows])
    return counts


def bits_per_byte(loss: float, targets: int, byte_count: int) -> float:
    """Return the bits that a model needs for a byte of the text; `loss` is the mean over `targets` tokens, in nats."""
    return loss * targets / (math.log(2) * byte_count) if byte_count else math.nan
