"""Options of the scripts that do not train: merge, extract an adapter, ask a model, show rows."""

from typing import Literal

from pydantic import Field

from accel_llm.config.fields import (
    Columns,
    DataFormat,
    Numbers,
    Options,
    Place,
    Places,
    Precision,
    Size,
    Sources,
    Texts,
)


class MergeOptions(Options):
    """Merge"""

    adapter: Places = Field(
        min_length=1,
        description="Folder or hub id of the adapter, or the folder of its run; several adapters are combined",
    )
    output_dir: Place = Field(description="Folder for the merged model")
    base: Place | None = Field(
        None, description="Folder or hub id of the base model; none: the one that the adapter names"
    )
    revision: str = Field("main", description="Branch, tag or commit of a base model on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the merged weights; auto: that of the base"
    )
    merge_base: Literal["original", "dequantized"] = Field(
        "original",
        description="For an adapter trained on 4 bits: merge into the base's own weights, or into the 4-bit ones",
    )
    allow_other_base: bool = Field(
        False, description="Accept a base with another fingerprint, for the same model stored in another way"
    )
    scale: float = Field(1.0, description="Factor of the weights that the adapter adds")
    adapter_weights: Numbers = Field(
        default_factory=list, description="Weight of each of several adapters; none: 1 for each"
    )
    combination_type: Literal["cat", "linear", "ties", "dare_linear", "dare_ties"] = Field(
        "cat", description="How several adapters become one; cat: the exact weighted sum of the weights they add"
    )
    density: float = Field(0.5, gt=0, le=1, description="Share of the values that ties and dare keep")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the values that dare drops")
    unmerge: bool = Field(False, description="Remove the adapter from base, which is a model that it was merged into")
    verify: Literal["modules", "logits", "none"] = Field(
        "modules",
        description="What is checked; modules: each module and the files; logits: the logits of the whole model too",
    )
    max_shard_size: Size = Field(50 * 10**9, description="Maximum size of a file of weights, such as 5GB")
    overwrite_output_dir: bool = Field(False, description="Replace the model that output_dir holds")
    allow_pickle: bool = Field(
        False, description="Read weights from .bin files (pickle) if there are no safetensors; only tensors are read"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    push_to_hub: str | None = Field(
        None, description="Hub id of a private repository to which the merged model is uploaded"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        count = len(self.adapter)
        if self.adapter_weights and len(self.adapter_weights) != count:
            problems.append(
                f"adapter_weights: {len(self.adapter_weights)} are given for {count} adapters; give one for each."
            )
        if count == 1:
            unused = self.model_fields_set & {"adapter_weights", "combination_type", "density", "seed"}
            problems += [
                f"{name}: only several adapters use it, but one is given; remove it." for name in sorted(unused)
            ]
        if self.unmerge and (count > 1 or self.base is None):
            what = "one adapter" if count > 1 else "base, the merged model"
            problems.append(f"unmerge: it removes one adapter from a merged model; give {what}.")
        return problems


class ExtractOptions(Options):
    """Extract"""

    model: Place = Field(description="Folder or hub id of the tuned model")
    base: Place = Field(description="Folder or hub id of the model from which it was tuned")
    output_dir: Place = Field(description="Folder for the adapter")
    lora_r: int = Field(16, ge=1, description="Rank of the adapter")
    modules_to_save: Texts = Field(
        default_factory=list,
        description="Names of modules that are saved completely: those that changed and are not linear layers",
    )
    overwrite_output_dir: bool = Field(False, description="Replace the adapter that output_dir holds")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")


class AskOptions(Options):
    """Ask"""

    model: Place = Field(description="Folder or hub id of a model, or the folder of an adapter or of a run")
    base: Place | None = Field(None, description="Base model of an adapter; none: the one that the adapter names")
    allow_other_base: bool = Field(
        False, description="Accept a base with another fingerprint, for the same model stored in another way"
    )
    max_new_tokens: int = Field(256, ge=1, description="Maximum number of tokens in an answer")
    temperature: float = Field(0.0, ge=0, description="Temperature of the sampling; 0: always the most likely token")
    chat_template: Place | None = Field(
        None, description="Chat template: chatml, or a .jinja file; none: the tokenizer's own"
    )
    precision: Precision = Field(
        "auto", description="Number format; auto: as stored, or fp32 on a CPU; with 4-bit weights as in training"
    )
    load_in_4bit: bool | None = Field(
        None, description="Hold the weights in 4 bits; none: only if the adapter was trained on such a base"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the sampling")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="Read weights from .bin files (pickle) if there are no safetensors; only tensors are read"
    )


class ChatOptions(AskOptions):
    """Chat"""

    adapters: Places = Field(
        default_factory=list,
        description="Folders of further adapters of the same base, or of their runs; a chat switches between them",
    )
    prompt: str | None = Field(None, description="One question to answer; none: a chat at the terminal")
    system: str | None = Field(None, description="System message of the chat")

    def problems(self) -> list[str]:
        names = [self.model, *self.adapters]
        twice = sorted({name for name in self.adapters if names.count(name) > 1})
        return super().problems() + [f"adapters: {name} is given twice; name it once." for name in twice]


class PredictOptions(AskOptions):
    """Predict"""

    input_files: Sources = Field(
        min_length=1,
        description="Rows to answer or classify: files, folders, globs, hub datasets, or - for standard input",
    )
    output_file: Place = Field(
        description="File for the rows and what the model tells of each: .jsonl, .csv or .parquet"
    )
    overwrite_output_file: bool = Field(
        False, description="Replace output_file, or what was begun for it with another model or other settings"
    )
    column_prefix: str = Field("", description="Text before the names of the new columns, such as generated")
    data_format: DataFormat | None = Field(None, description="Format of the rows; none: detected")
    columns: Columns = Field(
        default_factory=dict,
        description="Names in your data, as expected=yours (instruction=question), or role:yours=ours",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="Stop at a row that cannot be answered, or leave its answer out and say why"
    )
    max_length: int | None = Field(
        None, ge=2, description="Maximum tokens of a text, or of a prompt with its answer; none: the model's positions"
    )
    overlong: Literal["error", "truncate"] = Field(
        "error", description="For classifiers: stop at a text with more tokens than allowed, or cut it as training does"
    )
    per_device_eval_batch_size: int = Field(
        16, ge=1, description="Prompts that are answered, or texts that are classified, together"
    )


class ShowOptions(Options):
    """Show data"""

    # Every pydantic model has a method `json`, so the field needs another name than the option.
    json_lines: bool = Field(False, alias="json", description="Print one JSON object for each row and nothing else")


class MethodsOptions(Options):
    """Show methods"""

    methods: Texts = Field(default_factory=list, description="Names of the methods to show; none: all")
    json_lines: bool = Field(False, alias="json", description="Print one JSON object for each method and nothing else")
