"""Proves in a fresh process that llama.cpp serves a GGUF file as the model was trained, compared with transformers.

Four things are compared: the text that the chat template writes, the token ids of texts, the distributions of the next
token, and the most likely answers with their ends. The reference is the base with its adapter, unmerged, in float32.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from accel_llm.adapters.compat import read_adapter
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.compare_logits import load_adapted, load_plain
from accel_llm.merge.fresh_process import print_phase, run_in_fresh_process
from accel_llm.merge.gguf_file import ServedWords, convert_words, read_words
from accel_llm.merge.gguf_tokenizer import NORMAL, spelled_texts
from accel_llm.merge.served_texts import SERVED_CONVERSATIONS, vocabulary_texts
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.generation import without_own_settings
from accel_llm.model.positions import position_limit
from accel_llm.system.exit import run_script

LARGEST_DIVERGENCE = 1e-3  # nats a token, the mean of a file in float16
LONGEST_TEXT = 192  # tokens of a conversation that are compared
ASKED = 3  # conversations that are answered
ANSWER_TOKENS = 32
SPECIAL_TOKEN = 1 << 3  # of the attributes of a token in llama.cpp: LLAMA_TOKEN_ATTR_CONTROL


class ServedFile(NamedTuple):
    """How near a file is to the reference.

    `divergence`: KL divergence of its next-token distributions from the reference's, mean and largest of all tokens, in
    nats. `same_answers`: of `answers`, those that are equal to the last token.
    """

    divergence: float
    largest: float
    same_answers: int
    answers: int


class ServedProof(NamedTuple):
    """What was compared. `texts`: texts whose ids are equal, with `tokens` in all. `stops`: tokens that end an answer.

    `read_as_special`: plain texts that llama.cpp takes for special tokens, because it knows them by name. `files`: what
    was measured of each file, by its name.
    """

    texts: int
    tokens: int
    stops: list[str]
    read_as_special: list[str]
    files: dict[str, ServedFile]


@dataclass(frozen=True)
class ServedModel:
    """What is served: the model folder the files were made of, and the adapters and base it was merged from, if it was.

    `merge` are the options of that merge, as JSON values.
    """

    folder: Path
    adapters: tuple[Path, ...] = ()
    base: Path | None = None
    merge: dict[str, Any] | None = None


class ServedAnswer(NamedTuple):
    """A conversation as the reference computes it: ids, log-probabilities float32 [ids, vocabulary], and its answer."""

    prompt: list[int]
    answer: list[int]
    log_probabilities: torch.Tensor


def prove_served(model: ServedModel, files: list[Path], say: Callable[[str], None]) -> ServedProof:
    """Compare GGUF files, the first of them in float16, with the model, in a fresh process.

    Raises:
        ConfigError: llama.cpp cannot load a file, has other texts, ids or ends, or the distributions are too far apart.
    """
    arguments = [json.dumps(asdict(model), default=str), json.dumps([str(file) for file in files])]
    killed = "most often because memory ran out: it loads the whole model in float32; set verify to another value."
    result = run_in_fresh_process("accel_llm.merge.served", arguments, "asks the served model", killed, say)
    measured = {name: ServedFile(*values) for name, values in result["files"].items()}
    return ServedProof(**{**result, "files": measured})


def _main() -> None:
    """Print the proof as JSON. The command line holds the arguments of `prove_served`."""
    quiet_libraries()
    told = json.loads(sys.argv[1])
    adapters, base = tuple(map(Path, told["adapters"])), told["base"] and Path(told["base"])
    model = ServedModel(Path(told["folder"]), adapters, base, told["merge"])
    print(json.dumps(_prove(model, [Path(name) for name in json.loads(sys.argv[2])])._asdict()))


def _prove(model: ServedModel, files: list[Path]) -> ServedProof:
    words = read_words(model.folder)
    print_phase("comparing token ids")
    # The tokenizer is the same in all files, and the cheapest to compare.
    served = load_served(files[0], vocabulary_only=True)
    special = read_as_special(served, words)
    texts, tokens = compare_ids(served, words, special)
    stops = check_stops(served, words)
    served.close()

    print_phase("asking the model in transformers")
    samples = _ask_reference(_load_reference(model), words)
    measured = {}
    for file in files:
        print_phase(f"asking {file.name} in llama.cpp")
        measured[file.name] = measure_file(file, words, samples)
        _check_divergence(measured[file.name], file, LARGEST_DIVERGENCE if file == files[0] else math.inf)
    return ServedProof(texts, tokens, stops, special, measured)


def load_served(file: Path, vocabulary_only: bool = False, tokens: int = LONGEST_TEXT + ANSWER_TOKENS) -> Any:
    """Load a GGUF file by llama.cpp on the CPU, with room for `tokens` tokens.

    Raises:
        ConfigError: it cannot be loaded.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    settings: dict[str, Any] = {"n_ctx": tokens, "n_batch": tokens, "n_gpu_layers": 0, "verbose": False}
    if torch.get_num_threads() == 1:  # as for torch: other processes need the other cores
        settings |= {"n_threads": 1, "n_threads_batch": 1}
    try:
        return llama_cpp.Llama(str(file), vocab_only=vocabulary_only, logits_all=not vocabulary_only, **settings)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"verify: llama.cpp cannot load {file.name} ({error}); nothing was kept.") from None


def read_as_special(served: Any, words: ServedWords) -> list[str]:
    """Return the plain tokens of the vocabulary that llama.cpp takes for special ones, such as `</s>` of Qwen's."""
    converted = convert_words(words, served.n_vocab())
    special = [k for k in range(served.n_vocab()) if served._model.token_get_attr(k) & SPECIAL_TOKEN]
    return [converted.tokens[k] for k in special if converted.kinds[k] == NORMAL]


def compare_ids(served: Any, words: ServedWords, left_out: Sequence[str] = ()) -> tuple[int, int]:
    """Compare the ids of many texts, and the text of the template. Returns the number of texts and of their tokens.

    Tokens that hold one of `left_out` are not compared.

    Raises:
        ConfigError: a text has other ids, or the template writes another text.
    """
    texts, tokens = 0, 0
    for text, expected in _texts(served, words, left_out):
        adds = words.template is None
        actual = served.tokenize(text.encode(), add_bos=adds, special=True)
        if actual != expected:
            at = _first_difference(actual, expected)
            here = words.tokenizer.decode(expected[max(at - 3, 0) : at + 3])
            raise ConfigError(
                f"verify: llama.cpp has other token ids for {here!r} ({actual[at : at + 3]}, trained were "
                f"{expected[at : at + 3]}); nothing was kept."
            )
        texts, tokens = texts + 1, tokens + len(expected)
    return texts, tokens


def _texts(served: Any, words: ServedWords, left_out: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield texts with the ids that training gave them: conversations, then all tokens of the vocabulary."""
    backend, template = words.tokenizer.backend_tokenizer, words.template
    beginning = ""
    for messages in conversations(words):
        if template is None:
            text = messages[0]["content"]
            yield text, words.tokenizer(text).input_ids
        else:
            text = template.render(messages, add_generation_prompt=True)
            _compare_template(served, text, messages)
            yield text, template.prompt_ids(messages)
            beginning = beginning or text
    spelled = spelled_texts(convert_words(words, served.n_vocab()))
    for text in vocabulary_texts([text for text in spelled if not any(part in text for part in left_out)]):
        whole = beginning + text
        ids = (
            words.tokenizer(whole).input_ids
            if template is None
            else backend.encode(whole, add_special_tokens=False).ids
        )
        yield whole, ids


def conversations(words: ServedWords) -> list[list[dict[str, Any]]]:
    """Return the conversations that the template can write; without a template single texts."""
    if words.template is None:
        return [messages[-1:] for messages in SERVED_CONVERSATIONS]
    written = []
    for messages in SERVED_CONVERSATIONS:
        try:
            words.template.render(messages, add_generation_prompt=True)
        except DataError:  # a template without system messages, for example
            continue
        written.append(messages)
    return written


def _compare_template(served: Any, text: str, messages: list[dict[str, Any]]) -> None:
    """Render the template in the file as llama-cpp-python does, and compare the text."""
    formats: Any = importlib.import_module("llama_cpp.llama_chat_format")
    source = served.metadata.get("tokenizer.chat_template", "")
    names = {
        key: served._model.token_get_text(id)
        for key, id in (("bos_token", served.token_bos()), ("eos_token", served.token_eos()))
    }
    try:
        actual = formats.Jinja2ChatFormatter(source, **names)(messages=messages).prompt
    except Exception as error:  # of Jinja, or of the template itself
        raise ConfigError(
            f"verify: llama-cpp-python cannot use the chat template ({error}); nothing was kept."
        ) from None
    if actual != text:
        at = _first_difference(actual, text)
        raise ConfigError(
            f"verify: the chat template in the file writes {actual[at : at + 30]!r}, trained was {text[at : at + 30]!r}; "
            "nothing was kept."
        )


def _first_difference(actual: Sequence[Any], expected: Sequence[Any]) -> int:
    pairs = enumerate(zip(actual, expected, strict=False))
    return next((k for k, (one, other) in pairs if one != other), min(len(actual), len(expected)))


def check_stops(served: Any, words: ServedWords) -> list[str]:
    """Check that llama.cpp ends an answer at each stop token of the model; return their texts.

    Raises:
        ConfigError: it would go on behind one.
    """
    texts = [str(token) for token in words.tokenizer.convert_ids_to_tokens(words.stop_ids)]
    for token, text in zip(words.stop_ids, texts, strict=True):
        if not ends_answer(served, token):
            raise ConfigError(f"verify: llama.cpp would not end an answer at {text}; nothing was kept.")
    return texts


def _load_reference(model: ServedModel) -> Any:
    if model.merge is None:
        nothing = MergeOptions.model_validate({"adapter": ["-"], "output_dir": "-"})
        return load_plain(model.folder, "CAUSAL_LM", nothing).float().eval()
    options = MergeOptions(**model.merge)
    adapters = [read_adapter(adapter, options.allow_pickle) for adapter in model.adapters]
    if options.unmerge or model.base is None:  # the folder holds what is left without the adapter
        return load_plain(model.folder, adapters[0].config.task_type, options).float().eval()
    return load_adapted(adapters, model.base, options).float().eval()


def _ask_reference(reference: Any, words: ServedWords) -> list[ServedAnswer]:
    """Return each conversation with the reference's answer, if it is one of the first, and its distributions."""
    limit = position_limit(unwrap_causal_lm(reference).config) or LONGEST_TEXT
    samples = []
    for k, messages in enumerate(conversations(words)):
        text = messages[0]["content"]
        ids = words.template.prompt_ids(messages) if words.template else words.tokenizer(text).input_ids
        prompt = ids[: min(LONGEST_TEXT, limit - 1)]
        answer: list[int] = []
        if k < ASKED:
            answer = _answer(reference, prompt, min(ANSWER_TOKENS, limit - len(prompt)), words)
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        samples.append(ServedAnswer(prompt, answer, logits.log_softmax(-1)))
    return samples


def _answer(reference: Any, prompt: list[int], room: int, words: ServedWords) -> list[int]:
    """Return the most likely tokens after the prompt, up to the first stop token and with it."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=words.stop_ids, pad_token_id=words.tokenizer.pad_token_id
    )
    with torch.no_grad(), without_own_settings(reference):
        output = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def measure_file(file: Path, words: ServedWords, samples: list[ServedAnswer]) -> ServedFile:
    """Compare the distributions and answers of a GGUF file with the reference's.

    Raises:
        ConfigError: the file cannot be loaded.
    """
    served = load_served(file)
    divergences, same, answers = [], 0, 0
    for sample in samples:
        divergences.append(divergence(served_logits(served, sample.prompt + sample.answer), sample.log_probabilities))
        if sample.answer:
            answers += 1
            same += answer_served(served, sample.prompt, len(sample.answer)) == sample.answer
    served.close()
    every = torch.cat(divergences)
    return ServedFile(float(every.mean()), float(every.max()), same, answers)


def served_logits(served: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of a loaded GGUF file after each of the ids, float32 [ids, vocabulary]."""
    served.reset()
    served.eval(ids)
    return torch.from_numpy(served.scores[: len(ids)].copy())


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of each token, float64 [tokens]: of softmax(logits) from the reference.

    `expected` are the log-probabilities of the reference, float32 [tokens, vocabulary], as are the logits.
    """
    rows = zip(logits.split(16), expected.split(16), strict=True)  # float64 of a large vocabulary takes memory
    pairs = [(actual.double().log_softmax(-1), wanted.double()) for actual, wanted in rows]
    return torch.cat([(wanted.exp() * (wanted - actual)).sum(-1) for actual, wanted in pairs])


def answer_served(served: Any, prompt: list[int], room: int) -> list[int]:
    """Return the most likely tokens after the prompt: at most `room`, or to the first that ends an answer in llama.cpp."""
    served.reset()
    ids = prompt
    answer: list[int] = []
    while len(answer) < room and not (answer and ends_answer(served, answer[-1])):
        served.eval(ids)
        ids = [int(served.scores[served.n_tokens - 1].argmax())]
        answer += ids
    return answer


def ends_answer(served: Any, token: int) -> bool:
    """Return whether llama.cpp ends an answer at this token."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    return bool(llama_cpp.llama_vocab_is_eog(served._model.vocab, token))


def _check_divergence(measured: ServedFile, file: Path, bound: float) -> None:
    if not math.isfinite(measured.divergence):  # llama.cpp's kernels of quantized weights need rows of 64 and more
        raise ConfigError(f"quantize: llama.cpp computes no numbers with {file.name}; leave its format out.")
    if measured.divergence > bound:
        raise ConfigError(
            f"verify: {file.name} tells other probabilities than the model, by a KL divergence of "
            f"{measured.divergence:.1e} nats a token (allowed: {bound:.0e}); nothing was kept."
        )


if __name__ == "__main__":
    run_script(_main)
