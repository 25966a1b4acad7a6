"""For a model that only reads, a conversation has the tokens that transformers gives it: no border before an answer."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import load_template
from accel_llm.config.preference_options import DpoOptions, RewardOptions
from accel_llm.data.ledger import TRAINED
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.prepare import encode_conversations

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEMPLATE = "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[m.role] + m.content + '\n' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba ab"}] * 2
NAMES = ("llama2", "mistral-7b", "phi-3-mini", "qwen3", "smollm")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2: a space belongs to the word behind it."""
    vocabulary = {token: k for k, token in enumerate(["<unk>", *"▁QA:ab\n", "▁a", "▁b"])}
    model = models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", fuse_unk=True)
    backend: Any = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


def plain_ids(tokenizer: Any, messages: list[dict[str, Any]], template: str | None = None) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_space_before_an_answer_joins_its_first_word(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    tokenizer, file = metaspace_tokenizer(), str(tmp_path / "t.jinja")
    (row,) = load_template(tokenizer, file, in_one_piece=True).encode(CHAT).rows
    assert row.input_ids == plain_ids(tokenizer, CHAT, TEMPLATE)
    trained = [tokenizer.convert_ids_to_tokens(k) for k in row.labels if k != IGNORED]
    assert trained == ["▁b", "a", "▁a", "b"] * 2
    # A model that answers begins behind the space.
    (row,) = load_template(tokenizer, file).encode(CHAT).rows
    assert row.input_ids != plain_ids(tokenizer, CHAT, TEMPLATE)
    trained = [tokenizer.convert_ids_to_tokens(k) for k in row.labels if k != IGNORED]
    assert trained == ["b", "a", "▁a", "b"] * 2


def test_pairs_of_a_reward_model_are_encoded_so(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "chosen": "ab", "rejected": "ba"}\n')
    tokenizer, encoded = metaspace_tokenizer(), {}
    for kind, options_class in ((PreferenceKind(margins=True), RewardOptions), (PreferenceKind(), DpoOptions)):
        options = options_class(
            model_name_or_path="m",
            train_files=[str(tmp_path / "rows.jsonl")],
            output_dir=str(tmp_path / "out"),
            cache_dir=str(tmp_path / "cache"),
        )
        template = load_template(tokenizer, str(tmp_path / "t.jinja"), in_one_piece=options.gives_scores)
        data = encode_conversations(options, 0, tokenizer, template, preferences=kind)
        encoded[options_class] = [data.train[k][0].tolist() for k in range(2)], data.train.shared.tolist()
        assert [
            counts["rows"] for bins in data.ledger.bins.values() for name, counts in bins.items() if name == TRAINED
        ]
    sides = [[CHAT[0], {"role": "assistant", "content": text}] for text in ("ab", "ba")]
    rewarded, shared = encoded[RewardOptions]
    assert rewarded == [plain_ids(tokenizer, side, TEMPLATE) for side in sides]
    # The space is in the first token of each answer, so it is not shared.
    assert encoded[DpoOptions][0] != rewarded and [n + 1 for n in shared] == encoded[DpoOptions][1]


@pytest.mark.long
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real tokenizers is not here")
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers_and_templates(name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    chats = [
        [
            {"role": "user", "content": "Name a fruit.\n\nOr two"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": " And now?"},
            {"role": "assistant", "content": "中文 " + answer},
        ]
        for answer in ("Pear", "\n- pears\n", " 1. pear", "…", "pear and apple")
    ]
    compared = seams = 0
    for file in sorted((SHARED / "chat_templates" / "chujiezheng").glob("*.jinja")):
        try:
            template = load_template(tokenizer, str(file), in_one_piece=True)
        except Exception:
            continue  # its control tokens are not those of this tokenizer
        generating, source = load_template(tokenizer, str(file)), template.source
        for messages in chats:
            (row,) = template.encode(messages).rows
            assert row.input_ids == plain_ids(tokenizer, messages, source), (file.name, messages)
            compared, seams = compared + 1, seams + (generating.encode(messages).rows[0].input_ids != row.input_ids)
    # Of these only Qwen3's tokenizer has a token that would reach from a prompt into an answer.
    assert compared >= 25 and bool(seams) == (name == "qwen3")
