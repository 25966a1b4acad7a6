"""The tokenizer of the demo and the config of its base model."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from accel_llm.chat.template_source import CHATML

SPECIAL_TOKENS = END_OF_TEXT, START_OF_TURN, END_OF_TURN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How Llama 3 splits texts into words; llama.cpp knows it, and so it can serve the demo.
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THING_WORDS = (
    "red blue green black white pink tea milk rice bread fish cake cats dogs birds horses music snow rain sun "
    "books trains ships stars"
)
CAPITAL_WORDS = (
    "Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Colombia Bogota, "
    "Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, "
    "Greece Athens, Hungary Budapest, Iceland Reykjavik, India Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, "
    "Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Korea Seoul, Lebanon Beirut, Nepal Kathmandu, "
    "Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia Moscow, Spain Madrid, "
    "Sweden Stockholm, Syria Damascus, Thailand Bangkok, Tunisia Tunis, Turkey Ankara, Ukraine Kyiv, Vietnam Hanoi"
)
OTHER_WORDS = (
    "Add And Answer Give How Is My Name Now OK Repeat Reverse Say Sort Spell Tell What Which Write You a add after and "
    "answers are assistant backwards before capital city comes does even first friend helpful in is larger last letter "
    "like likes list me much number odd of one only or order plus short smaller spelled system the then to user what "
    "with word"
)
THINGS = THING_WORDS.split()
CAPITALS = {country: city for country, city in (pair.split() for pair in CAPITAL_WORDS.split(", "))}
WORDS = dict.fromkeys(
    [*OTHER_WORDS.split(), *THINGS, *CAPITALS, *CAPITALS.values()]
)  # a dict keeps the order and holds each once


def build_demo_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 256 bytes, the words of the demo and three special tokens; any UTF-8 text round-trips.

    A word of the demo is one token, with or without a space before it. Everything else, above all numbers and invented
    words, is spelled byte by byte, so that a model this small can see the digits and letters that it works on.
    """
    # The vocabulary, in the order of the token ids.
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [space + word for word in WORDS for space in ("", "Ġ") if len(space + word) > 1]

    # Without merges a word is one token if it is in the vocabulary (ignore_merges); otherwise it is split into bytes.
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    backend = Tokenizer(bpe)
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    backend.decoder = decoders.ByteLevel()

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def demo_base_config() -> PretrainedConfig:
    """Return the config of the shipped base model: fewer than 500,000 parameters, less than 2 MB in float32."""
    return LlamaConfig(
        vocab_size=len(build_demo_tokenizer()),
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
        eos_token_id=SPECIAL_TOKENS.index(END_OF_TURN),
        pad_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
    )
