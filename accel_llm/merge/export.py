"""Exports a model to the files that llama.cpp serves: a run, a model folder, or an adapter, which is merged first."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accel_llm.adapters.locate import find_adapter, find_base, locate_folder
from accel_llm.config.tool_options import ExportOptions, MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.gguf_file import check_serving_packages
from accel_llm.merge.gguf_model import check_family
from accel_llm.merge.merge import merge
from accel_llm.merge.serve import FLOAT16, MODELFILE, Served, write_served
from accel_llm.merge.served import ServedModel
from accel_llm.merge.skeleton import read_model_config
from accel_llm.system.folders import atomic_output, check_output_dir


@dataclass(frozen=True)
class ExportResult:
    """What was exported to `folder`; `source` says from where."""

    folder: Path
    source: str
    served: Served


def export(
    options: ExportOptions,
    say: Callable[[str], None] = lambda phase: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Write GGUF files of a model and prove them. `output_dir` appears complete or not at all.

    `say` is called with what is done next, `progress` with the bytes written and the bytes in all.

    Raises:
        ConfigError: there is no such model, GGUF cannot say what it is, or the file is not the model.
    """
    needs_llama = options.verify != "none" or set(options.quantize) != {FLOAT16}
    check_serving_packages("gguf", *(["llama_cpp"] if needs_llama else []))
    target, adapter = Path(options.output_dir).resolve(), find_adapter(options.model)
    if (adapter / "adapter_config.json").is_file():
        base = find_base(adapter, options.base)
        check_output_dir(target, [("adapter", adapter), ("base", Path(base))], options.overwrite_output_dir, MODELFILE)
        source = locate_folder(base, "base")
        check_family(read_model_config(source, False), source)
        described = f"{adapter} on {base}"
    elif options.base is not None:
        raise ConfigError(f"base: only an adapter has a base, but {options.model} is no adapter; remove it.")
    else:
        # A run with method full has its model in the folder model/.
        inner = adapter / "model"
        source = locate_folder(str(inner if (inner / "config.json").is_file() else options.model), "model")
        check_output_dir(target, [("model", source)], options.overwrite_output_dir, MODELFILE)
        described = str(source)

    with atomic_output(target) as partial:
        model, merged = ServedModel(source), partial / "merged"
        if (adapter / "adapter_config.json").is_file():
            model = _merge_first(options, adapter, source, merged, say, progress)
        served = write_served(model, partial, options.quantize, options.verify != "none", say, progress)
        if merged.exists():
            shutil.rmtree(merged)
    files = [target / file.name for file in served.files]
    return ExportResult(target, described, served._replace(files=files))


def _merge_first(
    options: ExportOptions,
    adapter: Path,
    base: Path,
    folder: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> ServedModel:
    """Merge the adapter into `folder`, in float32, so that the only rounding is that of the file."""
    say("merging")
    settings = {"adapter": [str(adapter)], "output_dir": str(folder), "base": str(base), "dtype": "float32"}
    settings |= {
        "allow_other_base": options.allow_other_base,
        "verify": "modules" if options.verify != "none" else "none",
    }
    merge(MergeOptions(**settings), progress)
    return ServedModel(folder, (adapter,), base, settings)
