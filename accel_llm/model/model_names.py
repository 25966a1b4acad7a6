"""Names of models and tokenizers: folders, hub ids, and families to build from; checked before any file is read."""

from pathlib import Path

from accel_llm.config.command_line import shell_command
from accel_llm.config.options import ModelOptions, TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.fresh_config import is_family, similar_family
from accel_llm.model.option_problems import model_option_problems
from accel_llm.system.hub import absence_reason


def model_problems(options: ModelOptions) -> list[str]:
    """Return one sentence for each problem with the model's name and options, before any file is read."""
    problems = model_option_problems(options) if isinstance(options, TrainOptions) else []
    problems += tokenizer_problems(options)
    names = {"model_name_or_path": options.model_name_or_path}
    if isinstance(options, PretrainOptions):
        names["config_name"] = options.config_name
    elif options.model_name_or_path is None:
        return [*problems, "model_name_or_path: is missing; name a model folder or a hub id."]
    for field, name in names.items():
        try:
            if name is not None and not (field == "config_name" and _is_family(name)):
                check_model_name(name, field, options.revision)
        except ConfigError as error:
            problems += error.problems
    return problems


def _is_family(name: str) -> bool:
    """Tell whether `name` is a family of models.

    Raises:
        ConfigError: it is nothing else, but nearly one.
    """
    if not is_family(name) and not Path(name).exists() and (guess := similar_family(name)):
        raise ConfigError(f"config_name: {name} is neither a folder nor a family of models; did you mean {guess}?")
    return is_family(name)


def tokenizer_problems(options: ModelOptions) -> list[str]:
    """Return the problem with the tokenizer's name, if the options give one, before any file is read."""
    name = options.tokenizer_name
    if name is None and isinstance(options, PretrainOptions) and is_family(options.config_name or ""):
        return [f"tokenizer_name: is missing, and the family {options.config_name} has no tokenizer; name one."]
    if name is None or not (reason := absence_reason(name, options.revision)):
        return []
    return [f"tokenizer_name: {name} {reason}; a folder with a tokenizer or a hub id (owner/name) is allowed."]


def check_model_name(name: str, field: str = "model_name_or_path", revision: str = "main") -> None:
    """Check that `name` can be a model: a folder with config.json, or a hub id while the hub or its cache answers.

    Raises:
        ConfigError: the path does not exist or is a file, or the folder has no config.json or holds an adapter.
    """
    if reason := absence_reason(name, revision):
        raise ConfigError(f"{field}: {name} {reason}; a model folder or a hub id (owner/name) is allowed.")
    path = Path(name)
    if (path / "adapter_config.json").is_file():
        # transformers 5.23 would silently load the base with the LoRA on it, but with nothing to train.
        raise ConfigError(
            f"{field}: {name} is an adapter, not a model; merge it first with "
            f"`{shell_command('merge.py', adapter=name, output_dir='MODEL')}`, or name its base model."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "model" / "config.json").is_file():
                raise ConfigError(f"{field}: {name} is the folder of a run; its model is {path / 'model'}.")
            file_names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"{field}: the folder {name} has no config.json (it holds {file_names}); a model folder has one."
            )
    elif path.exists():
        raise ConfigError(f"{field}: {name} is a file; a model folder or a hub id (owner/name) is allowed.")


def model_source(options: ModelOptions) -> str:
    """Return the model folder or hub id that a run starts from: a model with weights, or only a config.

    Raises:
        ConfigError: none is named.
    """
    name = (
        options.config_name
        if isinstance(options, PretrainOptions) and options.config_name
        else options.model_name_or_path
    )
    if name is None:
        raise ConfigError("model_name_or_path: is missing; name a model folder or a hub id.")
    return name
