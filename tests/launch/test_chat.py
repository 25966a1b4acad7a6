"""chat.py: its commands, questions of a file, sampling, and no model is asked for more positions than it has."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from accel_llm.config.tool_options import ChatOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.dialogues import choose_sampling

POSITIONS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with learned positions: one more is an IndexError. It never ends an answer by itself."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), build_demo_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    model = GPT2LMHeadModel(
        GPT2Config(
            **sizes, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(IndexError):
        model(torch.zeros(1, POSITIONS + 1, dtype=torch.int64))
    return folder


@pytest.fixture
def typed(monkeypatch) -> Callable[..., None]:
    """`typed("Hi", "/retry")` are the lines that the next chat reads, and then the end of its input."""

    def lines(*texts: str) -> None:
        left = iter(texts)

        def next_line(_: str = "") -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", next_line)

    return lines


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The tokens of each prompt that the model of GPT-2 gets."""
    generate, seen = GPT2LMHeadModel.generate, list[list[int]]()

    def noted(self, *arguments: object, **options: Any):
        seen.append(options["input_ids"][0].tolist())
        return generate(self, *arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", noted)
    return seen


def remarks(capsys) -> list[str]:
    """The remarks of the last chat, without the line above it."""
    lines = capsys.readouterr().err.splitlines()
    start = next(k for k, line in enumerate(lines) if "/help lists commands" in line)
    return lines[start + 1 :]


def plain_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a prompt as plain transformers writes it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_full_conversation_is_cut_at_a_turn_and_says_so(script, model, typed, prompts, tmp_path, capsys):
    """Each prompt is that of the system message and the turns that are left; what is saved is all of the conversation."""
    questions = ["What is 3 + 4?", "And 5?", "And 6?", "And 7?"]
    typed(*questions, f"/save {tmp_path / 'all.jsonl'}")
    script("chat", "--model", model, "--max_new_tokens", 4, "--temperature", 0, "--system", "Hi.")
    printed, tokenizer = capsys.readouterr(), AutoTokenizer.from_pretrained(model)
    system, *turns = json.loads((tmp_path / "all.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [turn["content"] for turn in turns[::2]] == questions and system == {"role": "system", "content": "Hi."}
    first, cuts = 0, []
    for k, ids in enumerate(prompts):
        lengths = [len(plain_ids(tokenizer, [system, *turns[2 * start : 2 * k + 1]])) for start in range(first, k + 1)]
        gone = next((gone for gone, length in enumerate(lengths) if length <= POSITIONS - 4), len(lengths) - 1)
        first += gone
        cuts += [gone] if gone else []
        assert ids == plain_ids(tokenizer, [system, *turns[2 * first : 2 * k + 1]])
    assert cuts
    said = [line for line in printed.err.splitlines() if "positions are full" in line]
    words = [
        "oldest question and its answer are" if cut == 1 else f"{cut} oldest questions and their answers are"
        for cut in cuts
    ]
    assert said == [
        f"[The model's {POSITIONS} positions are full: the {which} left out from now on.]" for which in words
    ]


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
def test_commands_switch_between_adapters_and_the_base(script, tiny, typed, tmp_path, monkeypatch, capsys):
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
    typed(question, "/adapter 2", question, question, "/adapter 0", question, "/adapter lora", question, "/base",
          "/adapter 3", "/adapter", "/switch", "/adapters")  # fmt: skip
    script("chat", "--model", "./lora", "--adapters", "ia3", "--max_new_tokens", 8)
    printed = capsys.readouterr()
    answers = printed.out.removesuffix("\n").split("\n")
    # The third was a second turn. The bare model answers after the adapter, which goes on.
    assert [answers[k] for k in (0, 1, 3, 4, 5)] == [first, second, bare, first, bare]
    said = [line for line in printed.err.splitlines() if "cut off" not in line]
    assert said == [
        "[./lora on base. On cpu, weights in float32. Greedy. /help lists commands.]",
        "[/adapter WHICH: 0 the bare model, 1 ./lora (now), 2 ia3.]",
        "[From now on ia3 on base answers; the conversation starts anew.]",
        "[From now on the bare model base answers; the conversation starts anew.]",
        "[From now on ./lora on base answers; the conversation starts anew.]",
        "[/adapter 3 names no adapter, or several; there are ./lora, ia3.]",
        "[/adapter needs a number or a name; there are ./lora, ia3.]",
        "[/switch is no command; there are /help, /reset, /system, /save, /retry, /base, /adapter, /adapters, /exit.]",
        "[/adapter WHICH: 0 the bare model, 1 ./lora (now), 2 ia3.]",
    ]

    script("chat", "--model", base, "--adapters", "ia3", "lora", "--max_new_tokens", 8, "--prompt", question)
    printed = capsys.readouterr()
    assert printed.out == f"{bare}\n{second}\n{first}\n"
    said = [line for line in printed.err.splitlines() if "answers" in line]
    assert said == ["[the bare model answers]", "[ia3 answers]", "[lora answers]"]


class Interrupt(StoppingCriteria):
    """Presses Ctrl-C after so many tokens."""

    def __init__(self, tokens: int):
        self.left = tokens

    def __call__(self, *_: object, **__: object) -> bool:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return False


@pytest.mark.parametrize("tokens", [0, 3])
def test_ctrl_c_keeps_the_part_of_an_answer_or_forgets_its_question(
    script, model, typed, monkeypatch, tmp_path, capsys, tokens
):
    generate, calls = GPT2LMHeadModel.generate, []

    def interrupted(self, *arguments: object, **options: Any):
        calls.append(options["input_ids"][0].tolist())
        stops = [Interrupt(tokens)] if len(calls) == 1 else []
        return generate(self, *arguments, **options, stopping_criteria=StoppingCriteriaList(stops))

    monkeypatch.setattr(GPT2LMHeadModel, "generate", interrupted)
    if not tokens:  # before the first token is there
        monkeypatch.setattr("accel_llm.model.answer_stream.AnswerStream.put", lambda *_: None)
    typed("Hi", f"/save {tmp_path / 'part.jsonl'}", "On", "/retry")
    script("chat", "--model", model, "--max_new_tokens", 4)
    printed, tokenizer = capsys.readouterr(), AutoTokenizer.from_pretrained(model)
    kept = "this part of the answer is kept" if tokens else "the question is forgotten"
    assert printed.err.count(f"[Stopped; {kept}.]") == 1
    file, turns = tmp_path / "part.jsonl", []
    if file.is_file():
        turns = json.loads(file.read_text(encoding="utf-8"))["messages"]
        assert turns[0] == {"role": "user", "content": "Hi"} and printed.out.startswith(f"{turns[1]['content']}\n")
    assert calls[1] == plain_ids(tokenizer, [*turns, {"role": "user", "content": "On"}]) and bool(turns) == bool(tokens)
    assert calls[2] == calls[1]


def test_commands_of_a_chat(script, model, typed, prompts, tmp_path, capsys):
    saved, refused = tmp_path / "chats.jsonl", tmp_path / "no" / "chats.jsonl"
    saved.write_text('{"messages": []}', encoding="utf-8")  # without a line end
    typed("", "/retry", "/save x.jsonl", "/system", "Hi", "/retry", "/system Be brief.", "/system", "/retry",
          "/save", "/save chats.txt", f"/save {refused}", f"/save {saved}", "/base", "/reset", "Hi", "/system none", "/retry",
          "/hepl", "/quit", "/etc/hosts?", "/adapter 1", "/exit", "never asked")  # fmt: skip
    script("chat", "--model", model, "--max_new_tokens", 3)
    decode = AutoTokenizer.from_pretrained(model).decode
    texts = [decode(ids).replace("<|im_start|>", "").replace("<|im_end|>", "") for ids in prompts]
    alone, brief = "user\nHi\nassistant\n", "system\nBe brief.\nuser\nHi\nassistant\n"
    assert texts[:5] == [alone, alone, brief, brief, alone]
    assert texts[5].endswith("user\n/etc/hosts?\nassistant\n") and len(texts) == 6
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    answer = rows[1]["messages"][-1]["content"]
    assert f"\n{answer}\n" in printed.out
    assert rows == [
        {"messages": []},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": answer},
            ]
        },
    ]
    said = [line.strip("[]") for line in printed.err.splitlines()[1:] if "cut off" not in line]
    assert said == [
        "There is no question yet.",
        "There is nothing to save yet.",
        "There is no system message.",
        "The same answer: it is greedy. Start with --temperature 0.8 for others.",
        "The system message is set; /retry answers the last question with it.",
        "The system message is: Be brief.",
        "/save needs the name of a .jsonl file, such as /save chats.jsonl; a row is added to it.",
        "/save needs the name of a .jsonl file, such as /save chats.jsonl; a row is added to it.",
        f"/save: {refused} cannot be written (No such file or directory).",
        f"Added to {saved}: a row with 1 question.",
        "The bare model is the one that answers.",
        "The conversation starts anew.",
        "The system message is removed; /retry answers the last question with it.",
        "/hepl is no command; did you mean /help?",
        "/quit is no command; did you mean /exit?",
        "There is no adapter; the model answers as it is.",
    ]


def test_a_question_that_is_too_long_does_not_end_the_chat(script, model, typed, prompts, capsys):
    typed("a long word " * 40, "Hi")
    script("chat", "--model", model, "--max_new_tokens", 3)
    (said,) = [line for line in remarks(capsys) if "cut off" not in line]
    assert said.startswith("[the question has ") and said.endswith("positions for question and answer; shorten it]")
    assert len(prompts) == 1


def test_help_says_what_is_in_force(script, model, typed, capsys):
    typed("/help")
    sampling = ("--temperature", 0.7, "--top_p", 0.9, "--repetition_penalty", 1.1)
    script("chat", "--model", model, "--max_new_tokens", 7, *sampling)
    printed = capsys.readouterr()
    in_force = "temperature 0.7, top_k 50, top_p 0.9, repetition_penalty 1.1"
    assert printed.out == "" and f"float32. {in_force.capitalize()}. /help lists commands.]" in printed.err
    assert f"{in_force}; an answer has at most 7 tokens." in printed.err
    assert all(f"\n{name}" in printed.err for name in ("/help", "/system TEXT", "/save FILE", "/base", "/exit"))


FLAGS = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"temperature": 2, "top_k": 0, "repetition_penalty": 1},
]
OWN = [{}, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"repetition_penalty": 1.2}]
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("flags", FLAGS)
def test_sampling_is_that_of_the_flags_then_of_the_model_then_of_transformers(own, flags, model):
    """The oracle is what `generate` of transformers has in force with the same flags."""
    plain = GPT2LMHeadModel.from_pretrained(model)
    plain.generation_config = GenerationConfig(**own)
    given = {name: value for name, value in flags.items() if flags != {"temperature": 0}}
    samples = flags.get("temperature", 1) > 0 and (
        own.get("do_sample") or {"temperature", "top_k", "top_p"} & flags.keys()
    )
    expected, _ = plain._prepare_generation_config(GenerationConfig(do_sample=bool(samples), **given))
    chosen = choose_sampling(GenerationConfig(**own), ChatOptions(model="m", **flags))
    actual, _ = plain._prepare_generation_config(GenerationConfig(**chosen))
    for name in SAMPLING if samples else ("do_sample", "repetition_penalty"):
        assert (getattr(actual, name) or None) == (getattr(expected, name) or None), name


def test_a_choice_of_tokens_that_has_no_effect_is_refused(script, model):
    for flags in (("--temperature", 0, "--top_p", 0.5), ("--temperature", 0, "--top_k", 5)):
        with pytest.raises(ConfigError, match=f"^{flags[2][2:]}: .* has no effect at temperature 0"):
            script("chat", "--model", model, "--prompt", "Hi", *flags)


def test_questions_of_a_file_are_answered_alone_and_in_order(script, model, tmp_path, prompts, capsys):
    lines, rows = tmp_path / "q.txt", tmp_path / "q.jsonl"
    lines.write_text("Hi\n\nWhat is 3 + 4?\n", encoding="utf-8")
    chat = [
        {"role": "system", "content": "Hm."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "no"},
    ]
    rows.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n", encoding="utf-8")
    options = ("--max_new_tokens", 3, "--system", "Be.")
    for file, texts in (
        (lines, ["system\nBe.\nuser\nHi\n", "system\nBe.\nuser\nWhat is 3 + 4?\n"]),
        (rows, ["system\nHm.\nuser\nHi\n", "system\nBe.\nuser\nHi\n"]),
    ):
        prompts.clear()
        script("chat", "--model", model, "--file", file, *options)
        printed, tokenizer = capsys.readouterr(), AutoTokenizer.from_pretrained(model)
        shown = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        assert shown == [f"{text}assistant\n" for text in texts]
        assert "[1 of 2: Hi]" in printed.err and "/help" not in printed.err
        alone = []
        for ids in list(prompts):  # the calls here are noted too
            output = GPT2LMHeadModel.from_pretrained(model).generate(
                input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
            alone.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        assert printed.out == "".join(f"{answer}\n" for answer in alone)


def test_bad_questions_are_one_sentence_before_any_answer(script, model, tmp_path, prompts):
    file = tmp_path / "q.jsonl"
    for text, sentence in (
        ("", "file: .*no rows"),
        ("{", f"file: {file}, line 1: not JSON"),
        ('{"prompt": "Hi"}\n{"a": 1}\n', f"^{file}, row 2: no prompt in this row"),
        (
            json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "long " * 99}),
            f"^{file}, row 2: prompt: the question",
        ),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises((ConfigError, DataError), match=sentence) as error:
            script("chat", "--model", model, "--file", file, "--max_new_tokens", 3)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^file: .*none\.txt does not exist"):
        script("chat", "--model", model, "--file", tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"^file: it cannot be combined with prompt"):
        script("chat", "--model", model, "--file", file, "--prompt", "Hi")
    with pytest.raises(DataError, match="the prompt is empty"):
        script("chat", "--model", model, "--prompt", " ")
    assert prompts == []
