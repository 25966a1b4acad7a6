"""chat.py at the terminal: commands switch between adapters, and no model is asked for more positions than it has."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

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


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's calls to transformers
def test_commands_switch_between_adapters_and_the_base(script, tiny, tmp_path, monkeypatch, capsys):
    """Each answers as it does alone, by plain PEFT or transformers; after a switch the conversation starts anew."""
    base, names = tmp_path / "base", ["lora", "ia3"]
    shutil.copytree(tiny, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    for k, config in enumerate(
        (LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    ):
        moved = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in (parameter for parameter in moved.parameters() if parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter))
        moved.save_pretrained(names[k])

    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    right = []
    for asked in (plain, *(AutoPeftModelForCausalLM.from_pretrained(tmp_path / name) for name in names)):
        output = asked.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        right.append(tokenizer.decode(output, skip_special_tokens=True))
    bare, first, second = right
    assert len({*right}) == 3

    question = "What is 3 + 4?"
    words = [question, "/adapter 2", question, question, "/base", question, "/adapter lora", question, "/adapter 3"]
    lines = iter([*words, "/adapter", "/switch", "/adapters", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    script("chat", "--model", "./lora", "--adapters", "ia3", "--max_new_tokens", 8)
    printed = capsys.readouterr()
    answers = printed.out.removesuffix("\n").split("\n")
    assert [answers[k] for k in (0, 1, 3, 4)] == [first, second, bare, first]  # the third was a second turn
    switches = "/adapter 1 asks ./lora, /adapter 2 asks ia3, /base asks the base alone"
    listed = f"[{switches}; /adapters says this again, an empty line ends.]"
    assert printed.err.splitlines()[-8:] == [
        listed,
        "[From now on ia3 answers; the conversation starts anew.]",
        "[From now on the base alone answers; the conversation starts anew.]",
        "[From now on ./lora answers; the conversation starts anew.]",
        "[/adapter 3 names no adapter, or several; there are ./lora, ia3.]",
        "[/adapter needs a number or a name; there are ./lora, ia3.]",
        "[/switch is no command; there are /adapter, /adapters and /base, and an empty line ends.]",
        listed,
    ]

    script("chat", "--model", base, "--adapters", "ia3", "lora", "--max_new_tokens", 8, "--prompt", question)
    printed = capsys.readouterr()
    assert printed.out == f"{bare}\n{second}\n{first}\n"
    assert printed.err.splitlines()[-3:] == ["[the base alone answers.]", "[ia3 answers.]", "[lora answers.]"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(script, model, monkeypatch, capsys):
    class Interrupt(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> bool:
            raise KeyboardInterrupt

    generate, calls = GPT2LMHeadModel.generate, []

    def interrupted(self, *arguments: object, **options: object):
        calls.append(options["input_ids"].tolist())
        stops = [Interrupt()] if len(calls) == 1 else []
        return generate(self, *arguments, **options, stopping_criteria=StoppingCriteriaList(stops))

    monkeypatch.setattr(GPT2LMHeadModel, "generate", interrupted)
    questions = iter(["Hi", "Hi", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    script("chat", "--model", model, "--max_new_tokens", 4)
    assert calls[0] == calls[1]  # the first question is forgotten
    assert capsys.readouterr().err.count("[Stopped; this question and its answer are forgotten.") == 1
