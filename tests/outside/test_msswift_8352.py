"""ms-swift 8352, also transformers 47553: programs that use transformers 4 cannot load a tokenizer that 5 has saved.

vLLM of that time stops at the class name TokenizersBackend, and at the list of extra_special_tokens, which must be
named additional_special_tokens. Both names that are right for transformers 4 mean the same in 5.
"""

import json
from pathlib import Path

from support import character_tokenizer
from transformers import AutoTokenizer

from accel_llm.model.tokenizer_file import save_tokenizer


def test_an_exported_tokenizer_has_names_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "stock")
    save_tokenizer(tokenizer, tmp_path / "ours")
    stock, ours = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("stock", "ours"))
    assert stock["tokenizer_class"] == "TokenizersBackend" and stock["extra_special_tokens"] == ["<|im_start|>"]
    assert ours["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ours["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in ours

    # In transformers 5 both say the same.
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("stock", "ours"))
    assert type(first) is type(second) and first.get_vocab() == second.get_vocab()
    assert first.all_special_ids == second.all_special_ids
    text = "<|im_start|>hello</s>"
    assert first(text) == second(text) == tokenizer(text)
