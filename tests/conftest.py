"""What several test files share: a tokenizer of one token a character, a tiny model, an Accelerator of one process."""

import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token, so that ids can be counted by hand."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Accelerate's state is global to the process: nothing of another test may be met, nothing is left to the next."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    def build(seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
        """Float32, with random weights so large that every token seen shows in the logits."""
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": len(SPECIAL) + len(string.printable),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model

    return build
