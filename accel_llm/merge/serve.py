"""Writes what llama.cpp and Ollama serve a model from: GGUF files and a Modelfile, and proves the files."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accel_llm.errors import ConfigError
from accel_llm.merge.gguf_file import ServedWords, read_words, write_gguf
from accel_llm.merge.served import ServedModel, ServedProof, prove_served

MODELFILE = "Modelfile"
FLOAT16 = "f16"  # the format that all others are made of
FILE_TYPES = {  # of llama.cpp
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
}


class Served(NamedTuple):
    """Files that a model can be served from. `proof` is None if nothing was compared; `notes` are for the user."""

    files: list[Path]
    proof: ServedProof | None
    notes: list[str]


def write_served(
    model: ServedModel,
    target: Path,
    formats: Sequence[str],
    prove: bool,
    say: Callable[[str], None] = lambda phase: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Served:
    """Write GGUF files of the model in these `formats`, and a Modelfile, into the folder `target`.

    `say` is called with what is done next, `progress` with the bytes written and the bytes in all.

    Raises:
        ConfigError: the model cannot be written as GGUF, or the file in float16 is not the model.
    """
    words = read_words(model.folder)
    say("writing")
    first = target / file_name(FLOAT16)
    notes = write_gguf(model.folder, first, words, progress)
    files = [first]
    for name in formats:
        if name != FLOAT16:
            say(f"quantizing to {name}")
            files.append(target / file_name(name))
            quantize(first, files[-1], name)
    proof = prove_served(model, files, say) if prove else None
    if FLOAT16 not in formats:
        first.unlink()
        files.remove(first)
    (target / MODELFILE).write_text(modelfile(files[0].name, words), encoding="utf-8")
    return Served(files, proof, notes)


def describe_proof(proof: ServedProof | None) -> list[str]:
    """Return sentences that say what was compared, and what was measured of each file."""
    if proof is None:
        return ["not verified"]
    stops = ", ".join(proof.stops)
    lines = [
        f"verified: llama.cpp has the same ids for {proof.texts} texts ({proof.tokens:,} tokens), and ends answers at {stops}"
    ]
    if proof.read_as_special:
        names = ", ".join(proof.read_as_special)
        lines.append(
            f"in texts llama.cpp takes {names} for special tokens, which it knows by name; in training it was text"
        )
    for name, file in proof.files.items():
        lines.append(
            f"verified: {name} has a KL divergence of {file.divergence:.1e} nats a token (at most {file.largest:.1e}), and "
            f"gives {file.same_answers} of {file.answers} answers word for word"
        )
    return lines


def file_name(number_format: str) -> str:
    """Return the name of the file with weights in this format."""
    return f"model-{number_format}.gguf"


def quantize(source: Path, target: Path, number_format: str) -> None:
    """Write the GGUF file `source` again with weights in another format, by llama.cpp's own function.

    Raises:
        ConfigError: llama.cpp refuses it.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, FILE_TYPES[number_format])
    with _quiet(llama_cpp):
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if failed:
        raise ConfigError(f"quantize: llama.cpp cannot write {source.name} as {number_format} (code {failed}).")


@contextmanager
def _quiet(llama_cpp: Any):
    """Within the block, keep llama.cpp from listing each tensor on the screen."""
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        logger = importlib.import_module("llama_cpp._logger")
        llama_cpp.llama_log_set(logger.llama_log_callback, None)


def modelfile(name: str, words: ServedWords) -> str:
    """Return the text of a Modelfile for Ollama: the GGUF file, where answers stop, and how they are sampled.

    The template is in the GGUF file; Ollama's own language for templates is another one, so none is written.
    """
    lines = [f"FROM ./{name}"]
    for text in words.tokenizer.convert_ids_to_tokens(words.stop_ids):
        quoted = str(text).replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'PARAMETER stop "{quoted}"')
    if words.generation.do_sample:
        for name_here, name_there in (
            ("temperature", "temperature"),
            ("top_k", "top_k"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
            ("repetition_penalty", "repeat_penalty"),
        ):
            if (value := getattr(words.generation, name_here)) is not None:
                lines.append(f"PARAMETER {name_there} {value}")
    else:
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"
