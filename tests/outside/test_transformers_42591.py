"""transformers 42591: it suspects tokenizers beside a Mistral config of a wrong pattern, also where the pattern is right.

A wrong one is mended, with the pattern that Mistral gives; a tokenizer with tokens of several digits was trained with
another pattern, and must stay as it is.
"""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.model.tokenizer import load_tokenizer

LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
pytestmark = pytest.mark.usefixtures("quiet")


def save(folder, merges: list[tuple[str, str]], model_type: str) -> None:
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokens += [f"<{k}>" for k in range(100_001 - len(tokens))]  # transformers looks at large vocabularies only
    backend = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=merges))
    steps = [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.57.0"}))


@pytest.mark.parametrize(
    ("merges", "model_type", "mended"),
    [([("o", "W")], "mistral", True), ([("o", "W"), ("1", "2")], "mistral", False), ([("o", "W")], "llama", False)],
)
def test_only_mistrals_own_tokenizers_get_mistrals_pattern(tmp_path, capsys, merges, model_type, mended):
    save(tmp_path, merges, model_type)
    tokenizer = load_tokenizer(str(tmp_path))
    # Mistral's pattern starts a new word at a capital letter.
    assert tokenizer.tokenize("oW") == (["o", "W"] if mended else ["oW"])
    assert ("wrong pattern" in capsys.readouterr().out) == mended
    tokenizer.save_pretrained(tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").tokenize("oW") == tokenizer.tokenize("oW")
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert ("fix_mistral_regex" in settings) == mended
