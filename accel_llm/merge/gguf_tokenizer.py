"""The tokenizer of a GGUF file: the one of llama.cpp that gives exactly the ids of a tokenizer.json, or none.

llama.cpp has two tokenizers for the models written here. `gpt2` splits a text into words by a pattern, and joins the
bytes of each word by merges. It knows the patterns by names only, so the pattern of a tokenizer.json must be one of
those in `SPLITS`. `llama` joins the characters of the whole text, the neighbours with the highest score first, as
SentencePiece does. A tokenizer that neither can be is refused: almost the same ids are other ids.
"""

import json
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from accel_llm.errors import ConfigError

# Kinds of tokens, as GGUF numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # stands for a space in a SentencePiece vocabulary
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NO_MERGE = f"{SPACE} {SPACE}"  # never applies to bytes, whose letters end before ▁; llama.cpp wants one merge at least

# Steps before the merges, as they stand in tokenizer.json.
_SHORT_FORMS, _NUMBERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = ("Split", _SHORT_FORMS + _NUMBERS + "{1,3}" + _REST)
QWEN2_SPLIT = ("Split", _SHORT_FORMS + _NUMBERS + _REST)
# llama.cpp's name of each sequence of steps; true: a word that is in the vocabulary is one token, whatever the merges.
SPLITS = {
    ((LLAMA3_SPLIT, ("ByteLevel", False)), True): "llama-bpe",
    ((LLAMA3_SPLIT, ("ByteLevel", False)), False): "smaug-bpe",
    ((QWEN2_SPLIT, ("ByteLevel", False)), False): "qwen2",
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
}
LEADING_SPACE = {"type": "Prepend", "prepend": SPACE}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


class GgufTokenizer(NamedTuple):
    """A tokenizer as a GGUF file holds it.

    `model`: `gpt2` or `llama`. `pattern`: llama.cpp's name of the steps before the merges. `tokens`: text of each id, for
    each row of the embedding. `kinds`: their kinds. `merges` are those of `gpt2`, `scores` those of `llama`.
    `leading_space`: whether a text without a space gets one, at the beginning and behind each special token.
    `adds_bos`, `adds_eos`: whether a text gets these tokens when nobody asks for a template.
    """

    model: str
    pattern: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    leading_space: bool
    adds_bos: bool
    adds_eos: bool


def convert_tokenizer(tokenizer: PreTrainedTokenizerFast, rows: int, special_first: bool) -> GgufTokenizer:
    """Return the tokenizer in the form of GGUF, with as many tokens as the embedding has `rows`.

    `special_first` says that the chat template's prompts begin with a special token. It decides whether texts get a
    leading space, where tokenizer.json puts one before the first text only, which llama.cpp cannot.

    Raises:
        ConfigError: llama.cpp has no tokenizer with the same ids.
    """
    steps = json.loads(tokenizer.backend_tokenizer.to_str())
    model = steps["model"]
    _check_added_tokens(tokenizer)
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _refusal(tokenizer, f"its model is {model['type']}, and only BPE without dropout and prefixes is written")
    pairs = [(first, second) for first, second in map(_pair, model["merges"])]
    tokens, kinds = _list_tokens(tokenizer, rows, byte_tokens=bool(model.get("byte_fallback")))
    adds_bos, adds_eos = _added_ends(tokenizer)
    if model.get("byte_fallback"):
        space = _leading_space(tokenizer, steps, special_first)
        scores = _merge_scores(tokenizer, model["vocab"], pairs, kinds)
        return GgufTokenizer("llama", "default", tokens, kinds, [], scores, space, adds_bos, adds_eos)
    pattern = _name_of_split(tokenizer, steps)
    merges = [" ".join(pair) for pair in pairs] or [NO_MERGE]
    return GgufTokenizer("gpt2", pattern, tokens, kinds, merges, [], False, adds_bos, adds_eos)


def _pair(merge: str | list[str]) -> list[str]:
    """Return a merge of tokenizer.json, which older files hold as one text."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _refusal(tokenizer: PreTrainedTokenizerFast, reason: str) -> ConfigError:
    name = tokenizer.name_or_path
    return ConfigError(f"model: the tokenizer of {name} cannot be written as GGUF with the same ids: {reason}.")


def _check_added_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise _refusal(tokenizer, f"the token {token.content} takes spaces beside it, which GGUF has no key for")


def _list_tokens(tokenizer: PreTrainedTokenizerFast, rows: int, byte_tokens: bool) -> tuple[list[str], list[int]]:
    """Return text and kind of each id below `rows`."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if vocabulary and max(vocabulary.values()) >= rows:
        raise _refusal(tokenizer, f"it has ids up to {max(vocabulary.values())}, but the embedding has {rows} rows")
    tokens, kinds = [f"[UNUSED_ROW_{k}]" for k in range(rows)], [UNUSED] * rows
    for text, index in vocabulary.items():
        tokens[index], kinds[index] = text, NORMAL
        if index in added:
            kinds[index] = CONTROL if added[index].special else USER_DEFINED
        elif byte_tokens and BYTE_TOKEN.fullmatch(text):
            kinds[index] = BYTE
    if byte_tokens and isinstance(tokenizer.unk_token_id, int):
        kinds[tokenizer.unk_token_id] = UNKNOWN
    if len(set(tokens)) < rows:
        raise _refusal(tokenizer, "two of its ids have the same text")
    return tokens, kinds


def _added_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Return whether the tokenizer puts its first token before a text, and its end token behind it."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for before in ([], [tokenizer.bos_token_id]):
        for behind in ([], [tokenizer.eos_token_id]):
            if whole == [*before, *plain, *behind]:
                return bool(before), bool(behind)
    raise _refusal(tokenizer, "it adds other tokens to a text than its first and its end token")


def _flatten(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, which may hold sequences."""
    if step is None:
        return []
    return [part for inner in step[key] for part in _flatten(inner, key)] if step["type"] == "Sequence" else [step]


def _name_of_split(tokenizer: PreTrainedTokenizerFast, steps: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits a text into words."""
    model = steps["model"]
    for normalizer in _flatten(steps["normalizer"], "normalizers"):
        if normalizer["type"] != "NFC":  # texts that people write are in this form already
            raise _refusal(tokenizer, f"it changes texts first ({normalizer['type']}), which llama.cpp does not")
    missing = set(_byte_letters()) - model["vocab"].keys()
    if missing and model.get("unk_token"):  # without one, both leave such a byte out
        raise _refusal(tokenizer, f"{len(missing)} of the 256 bytes are not in its vocabulary, and become one token")
    summary = tuple(_summary(step) for step in _flatten(steps["pre_tokenizer"], "pretokenizers"))
    name = SPLITS.get((summary, bool(model.get("ignore_merges"))))
    if name is None:
        whole = ", and takes whole words first (ignore_merges)" if model.get("ignore_merges") else ""
        described = " then ".join(f"{kind} {value!r}" for kind, value in summary) or "not at all"
        raise _refusal(
            tokenizer, f"it splits texts by {described}{whole}, and llama.cpp's names for that are not known"
        )
    return name


def _summary(step: dict[str, Any]) -> tuple[str, Any]:
    """Return a step's type and its one setting that matters; any other setting makes it a step that is not known."""
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex", step["pattern"])
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, bool(step["use_regex"])
    if kind == "Digits":
        return kind, bool(step["individual_digits"])
    return kind, json.dumps({key: value for key, value in step.items() if key != "type"})


def _byte_letters() -> list[str]:
    """Return the letters by which GPT-2 writes the 256 bytes: printable ones as they are, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def spelled_texts(converted: GgufTokenizer) -> list[str]:
    """Return the text of each token that stands for a text, in the order of the ids; parts of a character are left out."""
    if converted.model == "llama":
        kinds = (NORMAL, CONTROL, USER_DEFINED)
        pairs = zip(converted.tokens, converted.kinds, strict=True)
        return [token.replace(SPACE, " ") for token, kind in pairs if kind in kinds]
    order = [ord(letter) for letter in _byte_letters() if ord(letter) < 256]
    byte_of = dict(zip(_byte_letters(), [*order, *sorted(set(range(256)) - set(order))], strict=True))
    texts = []
    for token, kind in zip(converted.tokens, converted.kinds, strict=True):
        if kind == NORMAL and byte_of.keys() >= set(token):
            text = bytes(byte_of[letter] for letter in token).decode("utf-8", "replace")
            texts += [] if "\ufffd" in text else [text]
        elif kind in (CONTROL, USER_DEFINED):
            texts.append(token)
    return texts


def _leading_space(tokenizer: PreTrainedTokenizerFast, steps: dict[str, Any], special_first: bool) -> bool:
    """Return whether llama.cpp has to put a space before texts, at the beginning and behind special tokens."""
    normalizers = _flatten(steps["normalizer"], "normalizers")
    splits = _flatten(steps["pre_tokenizer"], "pretokenizers")
    if any(token.normalized for token in tokenizer.added_tokens_decoder.values()) and LEADING_SPACE in normalizers:
        raise _refusal(tokenizer, "it looks for its special tokens behind the leading space (normalized)")
    if not splits and normalizers in ([LEADING_SPACE, SPACES], [SPACES]):
        return LEADING_SPACE in normalizers
    if not normalizers and len(splits) == 1 and splits[0]["type"] == "Metaspace" and not splits[0]["split"]:
        scheme = splits[0]["prepend_scheme"]
        return scheme == "always" or (scheme == "first" and not special_first)
    kinds = ", ".join(step["type"] for step in [*normalizers, *splits]) or "no step"
    raise _refusal(tokenizer, f"it prepares texts by {kinds}, and not as SentencePiece does")


def _merge_scores(
    tokenizer: PreTrainedTokenizerFast, vocabulary: dict[str, int], pairs: list[tuple[str, str]], kinds: list[int]
) -> list[float]:
    """Return a score for each id: the earlier its first merge, the higher.

    SentencePiece joins any neighbours that make a token, so the merges must hold each way to make each token.
    """
    if missing := {f"<0x{byte:02X}>" for byte in range(256)} - vocabulary.keys():
        raise _refusal(tokenizer, f"{len(missing)} of its 256 byte tokens are missing")
    scores = [0.0] * len(kinds)
    for rank, text in enumerate(dict.fromkeys(first + second for first, second in pairs)):
        scores[vocabulary[text]] = -1.0 - rank
    known = set(pairs)
    for text, index in vocabulary.items():
        if kinds[index] != NORMAL:
            continue
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in known and all(part in vocabulary or len(part) == 1 for part in pair):
                raise _refusal(tokenizer, f"its merges lack {pair[0]!r} with {pair[1]!r}, which llama.cpp would join")
    return scores
