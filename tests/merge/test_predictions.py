"""Answers in batches are those that plain transformers gives each prompt alone; a job that ends early goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import FAMILIES, UNPACKABLE, moved_adapter, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from accel_llm.config.tool_options import PredictOptions
from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.predictions import Predictions, check_files, open_predictions
from accel_llm.merge.prompt_predictions import open_prompts
from accel_llm.model.batch_answers import PADDING, OwnNumbers, PromptRow, QuestionBatches, ignores_padding

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STORIES = Path(__file__).parents[3] / "shared" / "data" / "weights" / "stories260K_hf"
CHATS = [row["messages"] for row in demo_conversations("train")[:30]]
PENALTY = {"repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    """A model whose weights are so large that each prompt has another answer; every twelfth token ends one."""
    folder = make_model(tmp_path_factory.mktemp("model"), hidden_size=64, num_attention_heads=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = [2, *range(12, 600, 12)]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def chats_file(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": k, "messages": chat}) + "\n" for k, chat in enumerate(CHATS)), "utf-8")
    return path


def predict(model: Path | str, file: Path, output: str = "out.jsonl", **options: Any) -> list[dict[str, Any]]:
    """Answer a file as launch/predict.py does, and return the rows of its output."""
    path = file.with_name(output)
    settings = PredictOptions(model=str(model), input_files=[str(file)], output_file=str(path), **options)
    input_hash = check_files(settings)
    with open_predictions(settings, open_prompts(settings), input_hash) as predictions:
        predictions.survey()
        for batch in predictions.batches_left():
            predictions.answer(batch)
        predictions.finish()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(model: Any, folder: Path, prompt: list[dict[str, str]], tokens: int) -> tuple[str, bool]:
    """Return what plain transformers answers to one prompt, and whether the answer has ended."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    answer, stop = output[0, ids.shape[1] :], model.generation_config.eos_token_id
    ended = int(answer[-1]) in (stop if isinstance(stop, list) else [stop])
    return tokenizer.decode(answer, skip_special_tokens=True), ended


def check_answers(rows: list[dict[str, Any]], model: Any, folder: Path, tokens: int) -> None:
    assert [row["id"] for row in rows] == list(range(len(CHATS)))
    for row, chat in zip(rows, CHATS, strict=True):
        assert row["messages"] == chat and list(row) == ["id", "messages", "generated", "stopped"]
        assert (row["generated"], row["stopped"]) == alone(model, folder, chat[:-1], tokens), row["id"]


@pytest.mark.parametrize("settings", [{}, PENALTY, {"no_repeat_ngram_size": 2}], ids=str)
def test_each_answer_is_that_of_its_prompt_alone(folder, chats_file, tmp_path, settings):
    """For any size of the batch, also if the model's own settings look at the tokens before."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    for size in (16,) if settings else (1, 7, 64):
        rows = predict(
            tmp_path / "model", chats_file, f"{size}.jsonl", per_device_eval_batch_size=size, max_new_tokens=12
        )
        check_answers(rows, model, tmp_path / "model", 12)
    assert len({row["generated"] for row in rows}) > 20 and 0 < sum(row["stopped"] for row in rows) < len(rows)


def test_adapters_answer_as_plain_peft(folder, chats_file, tmp_path):
    for name, config in (
        ("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)),
        ("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    ):
        torch.manual_seed(1)
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        wrapped.save_pretrained(tmp_path / name)
        rows = predict(tmp_path / name, chats_file, f"{name}.jsonl", max_new_tokens=8)
        for row, chat in zip(rows, CHATS, strict=True):
            assert (row["generated"], row["stopped"]) == step_by_step(wrapped, folder, chat[:-1], 8), row["id"]


def step_by_step(model: Any, folder: Path, prompt: list[dict[str, str]], tokens: int) -> tuple[str, bool]:
    """Return what `alone` does, without `generate`: that of PEFT 0.21 leaves virtual tokens out (transformers 5.24)."""
    tokenizer, stop = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder).eos_token_id
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] - start < tokens and not (ids.shape[1] > start and int(ids[0, -1]) in stop):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True), int(ids[0, -1]) in stop


@pytest.mark.long
def test_a_4_bit_adapter_is_asked_as_it_was_trained(folder, chats_file, tmp_path):
    moved_adapter(folder, tmp_path / "adapter", method="qlora")
    in_4_bits = predict(tmp_path / "adapter", chats_file, max_new_tokens=6)
    whole = predict(tmp_path / "adapter", chats_file, "whole.jsonl", max_new_tokens=6, load_in_4bit=False)
    alone_ = predict(tmp_path / "adapter", chats_file, "1.jsonl", max_new_tokens=6, per_device_eval_batch_size=1)
    assert in_4_bits == alone_ != whole


def test_prompts_near_the_last_position_have_answers_up_to_it(chats_file, tmp_path):
    """Learned positions: one more is an IndexError. A prompt that fills them has no answer, and says so."""
    tokenizer = build_demo_tokenizer()
    template = [tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"] for chat in CHATS]
    lengths = sorted(map(len, template))
    positions = lengths[-3]
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, eos_token_id=2, bos_token_id=2)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError) as error:
        predict(tmp_path / "model", chats_file, max_new_tokens=20)
    first = next(k for k, ids in enumerate(template) if len(ids) >= positions)
    assert str(error.value) == (
        f"{chats_file}, row {first + 1}: the prompt has {len(template[first]):,} tokens, and with an answer at most "
        f"{positions:,} are allowed (positions of the model); on_bad_row: drop keeps such rows, without an answer."
    )
    rows = predict(tmp_path / "model", chats_file, max_new_tokens=20, on_bad_row="drop")
    rooms = set()
    for row, ids, chat in zip(rows, template, CHATS, strict=True):
        room = min(20, positions - len(ids))
        if room <= 0:
            assert (row["generated"], row["stopped"]) == (None, None) and row["problem"].startswith("the prompt has ")
            continue
        rooms.add(room)
        assert (row["generated"], row["stopped"]) == alone(model, tmp_path / "model", chat[:-1], room)
        assert row["problem"] is None
    assert len(rooms) > 3


def test_a_sampled_answer_depends_on_seed_and_row_alone(folder, chats_file):
    options: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 10}
    by_size = [predict(folder, chats_file, f"{k}.jsonl", per_device_eval_batch_size=k, **options) for k in (1, 5, 64)]
    assert by_size[0] == by_size[1] == by_size[2]
    torch.manual_seed(9)
    assert predict(folder, chats_file, "again.jsonl", **options) == by_size[0]
    other = predict(folder, chats_file, "other.jsonl", seed=1, **options)
    assert sum(one["generated"] != two["generated"] for one, two in zip(other, by_size[0], strict=True)) > 20


def test_the_numbers_draw_from_the_distribution_of_the_scores():
    torch.manual_seed(0)
    scores = torch.randn(1, 50) * 2
    scores[0, 7] = -torch.inf
    count, probabilities = 40_000, scores.softmax(-1)[0].numpy()
    numbers = torch.from_numpy(np.random.default_rng(0).random((count, 1)))
    left = OwnNumbers(numbers, 3)(torch.zeros(count, 3), scores.expand(count, -1))
    assert torch.equal(left.isfinite().sum(-1), torch.ones(count))
    shares = np.bincount(left.argmax(-1).numpy(), minlength=50) / count
    assert shares[7] == 0
    assert (np.abs(shares - probabilities) < 5 * np.sqrt(probabilities / count) + 1e-9).all()


def test_temperature_and_the_models_own_top_k_count(folder, chats_file, tmp_path):
    """With `top_k` 1 sampling is greedy, as it is with transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(top_k=1, do_sample=True)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    sampled = predict(tmp_path / "model", chats_file, temperature=2.0, max_new_tokens=6)
    assert sampled == predict(folder, chats_file, "greedy.jsonl", max_new_tokens=6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "bloom"])
def test_families_ignore_padding(family):
    assert ignores_padding(tiny_model(family))


@pytest.mark.long
@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_all_families_give_batches_the_answers_of_each_alone(family):
    batches, questions = make_batches(tiny_model(family))
    check_batches(batches, questions)


def make_batches(model: Any) -> tuple[QuestionBatches, list[PromptRow]]:
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=[2], pad_token_id=0)
    dialogue = type("Asked", (), {"model": model, "tokenizer": build_demo_tokenizer(), "settings": settings})
    torch.manual_seed(1)
    questions = [PromptRow(k, torch.randint(3, 60, (3 + k % 5,)).tolist()) for k in range(12)]
    return QuestionBatches(dialogue, None, 5, 0), questions  # type: ignore[arg-type]


def check_batches(batches: QuestionBatches, questions: list[PromptRow]) -> None:
    for batch in batches.cut(questions):
        for question, answer in zip(batch, batches.answer(batch), strict=True):
            assert [answer] == batches.answer([question])


def test_a_model_that_reads_padding_is_asked_in_batches_of_one_length(monkeypatch):
    model = tiny_model("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: forward(*a, **k | {"attention_mask": None}))
    batches, questions = make_batches(model)
    assert not batches.may_pad
    assert [len({len(question.ids) for question in batch}) for batch in batches.cut(questions)] == [1] * 5
    check_batches(batches, questions)
    batches.may_pad = True
    with pytest.raises(AssertionError):
        check_batches(batches, questions)


def test_a_few_long_prompts_are_not_padded_to(tmp_path):
    batches, _ = make_batches(tiny_model("llama"))
    batches.limit, batches.size = None, 16
    questions = [PromptRow(k, [1] * length) for k, length in enumerate([5000, 3000, *[40] * 30])]
    lengths = [[len(question.ids) for question in batch] for batch in batches.cut(questions)]
    assert lengths == [[5000, 3000], [40] * 16, [40] * 14]
    for batch in batches.cut([PromptRow(k, [1] * (k * 37 % 900 + 1)) for k in range(300)]):
        assert sum(len(batch[0].ids) - len(question.ids) for question in batch) <= PADDING


def test_wherever_a_job_is_killed_it_goes_on(folder, chats_file, monkeypatch):
    """The file of answers is cut at any byte; what is whole in it is not answered again, and the output is the same."""
    options: dict[str, Any] = {"max_new_tokens": 5, "per_device_eval_batch_size": 4}
    right, part = predict(folder, chats_file, "right.jsonl", **options), chats_file.with_name("out.jsonl.part")
    kept = {}
    monkeypatch.setattr(Predictions, "finish", lambda self: kept.update(content=self.part.path.read_bytes()))
    with pytest.raises(FileNotFoundError):  # the output, which was not written
        predict(folder, chats_file, **options)
    monkeypatch.undo()

    asked: list[list[int]] = []
    answer = QuestionBatches.answer

    def counted(self: QuestionBatches, batch: list[PromptRow]) -> Any:
        asked.append([question.number for question in batch])
        return answer(self, batch)

    monkeypatch.setattr(QuestionBatches, "answer", counted)
    predict(folder, chats_file, "whole.jsonl", **options)
    batches, ends = list(asked), [k + 1 for k, byte in enumerate(kept["content"]) if byte == 10]
    assert len(ends) == len(batches) + 1
    for length in (0, 5, ends[0], ends[0] + 1, ends[3] - 1, ends[3], len(kept["content"]) - 1, len(kept["content"])):
        part.write_bytes(kept["content"][:length])
        asked.clear()
        assert predict(folder, chats_file, **options, overwrite_output_file=True) == right
        whole = sum(end <= length for end in ends) - 1
        assert asked == batches[max(whole, 0) :] and not part.exists()


def test_what_was_begun_with_something_else_is_refused_in_one_sentence(folder, chats_file, tiny):
    part = chats_file.with_name("out.jsonl.part")
    options: dict[str, Any] = {"max_new_tokens": 5}

    answer = Predictions.answer

    def answer_and_stop(self: Predictions, batch: list[PromptRow]) -> None:
        answer(self, batch)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Predictions, "answer", answer_and_stop)
        predict(folder, chats_file, **options)
    advice = "give the same, name another file, or set overwrite_output_file to begin anew."

    def sentence(model: Path, **changes: Any) -> str:
        content = part.read_bytes()
        with pytest.raises(ConfigError) as error:
            predict(model, chats_file, **options | changes)
        assert part.read_bytes() == content
        return str(error.value).replace(str(part), "PART")

    assert sentence(tiny) == f"output_file: PART was begun with another model; {advice}"
    # A model that differs in one row of its embedding is another one.
    twin = shutil.copytree(folder, chats_file.with_name("twin"))
    weights = load_file(twin / "model.safetensors")
    weights["model.embed_tokens.weight"][3] += 1
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    assert sentence(twin) == f"output_file: PART was begun with another model; {advice}"
    assert sentence(folder, max_new_tokens=6) == (
        f"output_file: PART was begun with other max_new_tokens (max_new_tokens was 5, now 6); {advice}"
    )
    assert sentence(folder, temperature=0.5).startswith(
        "output_file: PART was begun with other temperature and other seed"
    )
    chats_file.write_text(chats_file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert sentence(folder) == f"output_file: PART was begun with other input_files; {advice}"
    assert len(predict(folder, chats_file, **options, overwrite_output_file=True)) == 2 * len(CHATS)
    part.write_text("notes of somebody\n", encoding="utf-8")
    chats_file.with_name("out.jsonl").unlink()
    assert sentence(folder) == "output_file: PART holds something else than answers; move it away."


def test_two_processes_do_not_write_one_file(folder, chats_file):
    settings = PredictOptions(
        model=str(folder), input_files=[str(chats_file)], output_file=str(chats_file.with_name("out.csv"))
    )
    input_hash, answerer = check_files(settings), open_prompts(settings)
    with open_predictions(settings, answerer, input_hash):
        script = (
            "import sys; from accel_llm.system.run_lock import locked; from pathlib import Path\n"
            "from accel_llm.system.folders import hidden_sibling\n"
            "output = Path(sys.argv[1])\n"
            "with locked(hidden_sibling(output, 'lock'), output, 'output_file'): pass"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, settings.output_file], capture_output=True, encoding="utf-8"
        )
    assert f"output_file: {settings.output_file} is in use by process " in ended.stderr
    assert "wait for its end, or name another file." in ended.stderr


def test_bad_rows_stop_before_anything_is_generated_or_keep_their_place(folder, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": "a " * 400}, {"title": "x"}, {"prompt": "Who?", "id": 7}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(QuestionBatches, "answer", lambda *_: pytest.fail("something was generated"))
        with pytest.raises(DataError) as error:
            predict(folder, file)
    assert str(error.value) == (
        f"{file}, row 2: prompt: the prompt is empty; needs a question (its keys: prompt); on_bad_row: drop keeps such "
        "rows, without an answer."
    )
    written = predict(folder, file, on_bad_row="drop", max_new_tokens=4)
    assert [{name: row[name] for name in row if name in ("prompt", "title", "id")} for row in written] == rows
    problems = [row["problem"] for row in written]
    assert problems[0] is None and problems[4] is None and all(problems[1:4])
    assert problems[2] is not None and problems[2].endswith("at most 256 are allowed (positions of the model)")
    assert [row["generated"] is None for row in written] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"output_file": "out.txt"}, "output_file: out.txt ends with '.txt'; allowed: a name that ends with "),
        ({"output_file": "rows.jsonl"}, "output_file: rows.jsonl belongs to rows.jsonl, which is read; name another "),
        ({"output_file": "there.csv"}, "output_file: there.csv exists already; name another file, or set overwrite"),
        ({"output_file": "folder.csv"}, "output_file: folder.csv is a folder; name a file in it."),
        ({"input_files": ["none.jsonl"]}, "input_files: none.jsonl does not exist"),
        ({"columns": {"wizard": "x"}}, "columns: wizard=x, but 'wizard' is not a field; the fields are "),
        ({"max_length": 300}, "max_length: 300, but the model has 256 positions; give no more."),
        (
            {"column_prefix": "old_"},
            "column_prefix: 'old_' makes a new column 'old_stopped', but rows.jsonl, row 1 has ",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(folder, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "Hi", "old_stopped": 1}\n', encoding="utf-8")
    Path("there.csv").touch()
    Path("folder.csv").mkdir()
    settings = {"model": str(folder), "input_files": ["rows.jsonl"], "output_file": "out.jsonl"} | options
    with pytest.raises((ConfigError, DataError)) as error:
        parsed = PredictOptions(**settings)
        input_hash = check_files(parsed)
        with open_predictions(parsed, open_prompts(parsed), input_hash) as predictions:
            predictions.survey()
    assert str(error.value).startswith(sentence)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the data is not here")
@pytest.mark.long
def test_a_published_model_answers_published_rows_as_plain_transformers_does(tmp_path):
    """Through a chat template of its own tokens, and a file of alpaca rows."""
    rows = json.loads((STORIES.parents[1] / "instruct" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:24]
    file, template = tmp_path / "rows.json", tmp_path / "plain.jinja"
    file.write_text(json.dumps(rows), encoding="utf-8")
    template.write_text(
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' "
        "else '\\n' }}{% endfor %}",
        encoding="utf-8",
    )
    written = predict(STORIES, file, chat_template=str(template), max_new_tokens=24, on_bad_row="drop")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template, answered = template.read_text(encoding="utf-8"), 0
    for row, source in zip(written, rows, strict=True):
        assert {name: row[name] for name in source} == source
        if row["problem"]:
            continue
        answered += 1
        chat = [{"role": "user", "content": "\n".join(filter(None, (source["instruction"], source["input"])))}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert row["generated"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answered > 12
