"""chat.py never asks a model for more positions than it has: the conversation starts anew, or a sentence says why not."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError

POSITIONS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with learned positions: one more is an IndexError. It never ends an answer by itself."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), build_demo_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(IndexError):
        model(torch.zeros(1, POSITIONS + 1, dtype=torch.int64))
    return folder


def test_a_conversation_that_outgrows_the_positions_starts_anew(script, model, monkeypatch, capsys):
    questions = iter(["What is 3 + 4?", "And 5?", "And 6?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    script("chat", "--model", model, "--max_new_tokens", 20, "--temperature", 0)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[The conversation")]
    anew = f"tokens, but the model {POSITIONS} positions: it starts anew with this question.]"
    assert notes and all(note.endswith(anew) for note in notes)


def test_an_answer_that_meets_the_last_position_is_said_to_be_cut_off(script, model, capsys):
    script("chat", "--model", model, "--max_new_tokens", 4, "--prompt", "Hi", "--temperature", 0)
    assert "positions" not in capsys.readouterr().err
    script("chat", "--model", model, "--max_new_tokens", 400, "--prompt", "Hi", "--temperature", 0)
    assert capsys.readouterr().err.endswith(
        f"[The answer is cut off at the last of the model's {POSITIONS} positions.]\n"
    )


def test_a_question_without_room_for_an_answer_is_one_sentence(script, model):
    with pytest.raises(ConfigError) as error:
        script("chat", "--model", model, "--prompt", "a long word " * 40)
    assert str(error.value).startswith("prompt: the question has ") and str(error.value).endswith(
        f"tokens with the chat template, but the model has {POSITIONS} positions for question and answer; shorten it."
    )
