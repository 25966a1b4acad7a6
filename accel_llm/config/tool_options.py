"""Options of the scripts that do not train: merge, extract an adapter, ask a model, show rows."""

from typing import ClassVar, Literal

from pydantic import Field

from accel_llm.config.fields import (
    Columns,
    DataFormat,
    GgufFormats,
    Numbers,
    Options,
    Place,
    Places,
    Precision,
    Size,
    Sources,
    Texts,
)
from accel_llm.config.hub_options import HubOptions

MAX_COMPARED_RUNS = 20  # more curves in one picture cannot be told apart


class MergeOptions(HubOptions):
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
    verify: Literal["modules", "logits", "served", "none"] = Field(
        "modules",
        description="What is checked; modules: each module and the files; logits: the logits of the whole model too; "
        "served: writes model-f16.gguf as well, and compares what llama.cpp computes with it",
    )
    max_shard_size: Size = Field(50 * 10**9, description="Maximum size of a file of weights, such as 5GB")
    overwrite_output_dir: bool = Field(False, description="Replace the model that output_dir holds")
    allow_pickle: bool = Field(
        False, description="Read weights from .bin files (pickle) if there are no safetensors; only tensors are read"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")

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


class ExportOptions(Options):
    """Export"""

    model: Place = Field(description="Folder or hub id of a model, or the folder of an adapter or of a run")
    output_dir: Place = Field(description="Folder for the files")
    quantize: GgufFormats = Field(
        default_factory=lambda: ["f16"], description="Number formats of the weights; each gives a model-FORMAT.gguf"
    )
    base: Place | None = Field(None, description="Base model of an adapter; none: the one that the adapter names")
    allow_other_base: bool = Field(
        False, description="Accept a base with another fingerprint, for the same model stored in another way"
    )
    verify: Literal["served", "none"] = Field(
        "served", description="served: compare token ids, probabilities and answers of llama.cpp with transformers"
    )
    overwrite_output_dir: bool = Field(False, description="Replace the files that output_dir holds")


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
    file: Place | None = Field(
        None,
        description="File with questions to answer: .txt with one in each line, or .jsonl with messages in each row",
    )
    system: str | None = Field(None, description="System message of the chat")
    max_new_tokens: int = Field(1024, ge=1, description="Maximum number of tokens in an answer")
    temperature: float | None = Field(  # type: ignore
        None,
        ge=0,
        description="Temperature of the sampling; 0: always the most likely token; none: as the model's generation "
        "config says",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens that have this probability together"
    )
    top_k: int | None = Field(None, ge=0, description="Sample from this many of the likeliest tokens; 0: from all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Sample from tokens that are at least this much as likely as the likeliest"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="How much less likely tokens become that were there before; 1: not at all"
    )

    def problems(self) -> list[str]:
        names = [self.model, *self.adapters]
        twice = sorted({name for name in self.adapters if names.count(name) > 1})
        problems = super().problems() + [f"adapters: {name} is given twice; name it once." for name in twice]
        if self.file is not None and self.prompt is not None:
            problems.append("file: it cannot be combined with prompt; give one of the two.")
        return problems


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

    rows: int = Field(5, ge=1, description="How many rows are shown; with json all are, if it is not given")
    source: str | None = Field(None, description="Read only this source: a name in train_files, as the ledger has it")
    random: bool = Field(False, description="Show rows from all over the data, drawn with seed, not the first ones")
    row: str | None = Field(
        None, description='Show one row alone: its number in its file, or its name as in errors ("FILE, row 7")'
    )
    # Every pydantic model has a method `json`, so the field needs another name than the option.
    json_lines: bool = Field(False, alias="json", description="Print one JSON object for each row and nothing else")

    def problems(self) -> list[str]:
        problems = super().problems()
        for name in ("rows", "random"):
            if self.row is not None and name in self.model_fields_set:
                problems.append(f"{name}: it cannot be combined with row, which is one row; remove one of the two.")
        return problems


class ReportOptions(Options):
    """Report"""

    before_names: ClassVar[str | None] = "runs"

    runs: Places = Field(
        default_factory=list,
        description="Output folders of runs, before all options; several are laid over one another",
    )
    output_file: Place | None = Field(
        None, description="The page, a file .html; none: compare.html or, of one run, report.html in its folder"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.runs:
            problems.append("runs: none is given; name the output_dir of a run, or of several.")
        if len(self.runs) > MAX_COMPARED_RUNS:
            problems.append(f"runs: {len(self.runs)} are given; give at most {MAX_COMPARED_RUNS}.")
        if self.output_file and not self.output_file.endswith(".html"):
            problems.append(f"output_file: {self.output_file} is no name of a page; let it end with .html.")
        return problems


class MethodsOptions(Options):
    """Show methods"""

    methods: Texts = Field(default_factory=list, description="Names of the methods to show; none: all")
    json_lines: bool = Field(False, alias="json", description="Print one JSON object for each method and nothing else")
