"""Options of the scripts that do not train: merging, extracting an adapter, asking a model, looking at rows."""

from typing import Literal

from pydantic import Field

from accel_llm.config.fields import Numbers, Options, Precision, Size, Texts


class MergeOptions(Options):
    """Merge"""

    adapter: Texts = Field(
        min_length=1,
        description="Folder or hub id of the adapter, or folder of the run that made it; several are combined",
    )
    output_dir: str = Field(description="Folder for the merged model")
    base: str | None = Field(None, description="Folder or hub id of the base model; none: the one the adapter names")
    revision: str = Field("main", description="Branch, tag or commit of a hub base model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights, merged and written; auto: as the base has them"
    )
    merge_base: Literal["original", "dequantized"] = Field(
        "original",
        description="Of an adapter trained on 4 bits: merge into the base's own weights, or into those 4 bits",
    )
    allow_other_base: bool = Field(
        False,
        description="Take a base with another fingerprint than the adapter's: the same model stored in another way",
    )
    scale: float = Field(1.0, description="Factor on all that the adapter adds")
    adapter_weights: Numbers = Field(default_factory=list, description="One for each of several adapters; none: 1 each")
    combination_type: Literal["cat", "linear", "ties", "dare_linear", "dare_ties"] = Field(
        "cat", description="How several adapters become one; cat: the weighted sum of what they add, exactly"
    )
    density: float = Field(0.5, gt=0, le=1, description="Share of values that ties and dare keep")
    seed: int = Field(42, ge=0, lt=2**32, description="Of what dare drops")
    unmerge: bool = Field(False, description="Take the adapter out of base, a model that it was merged into")
    verify: Literal["modules", "logits", "none"] = Field(
        "modules", description="What is compared: each module and the files; or the whole model's logits as well"
    )
    max_shard_size: Size = Field(50 * 10**9, description="Largest weights file, such as 5GB")
    overwrite_output_dir: bool = Field(False, description="Replace the model that output_dir holds")
    allow_pickle: bool = Field(False, description="Read weights from .bin files, which are pickles (tensors only)")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    push_to_hub: str | None = Field(None, description="Hub id to upload the merged model to, as a private repository")

    def problems(self) -> list[str]:
        found = super().problems()
        count = len(self.adapter)
        if self.adapter_weights and len(self.adapter_weights) != count:
            found.append(
                f"adapter_weights: {len(self.adapter_weights)} are given for {count} adapters; give one for each"
            )
        if count == 1:
            set_here = self.model_fields_set & {"adapter_weights", "combination_type", "density", "seed"}
            found += [f"{name}: only several adapters use it, one is given" for name in sorted(set_here)]
        if self.unmerge and (count > 1 or self.base is None):
            what = "one adapter" if count > 1 else "base, the merged model"
            found.append(f"unmerge: takes one adapter out of a merged model; give {what}")
        return found


class ExtractOptions(Options):
    """Extract"""

    model: str = Field(description="Folder or hub id of the tuned model")
    base: str = Field(description="Folder or hub id of the model that it was tuned from")
    output_dir: str = Field(description="Folder for the adapter")
    lora_r: int = Field(16, ge=1, description="Rank of the adapter")
    modules_to_save: Texts = Field(
        default_factory=list, description="Modules saved whole, by name: what changed and is no linear layer"
    )
    overwrite_output_dir: bool = Field(False, description="Replace the adapter that output_dir holds")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")


class ChatOptions(Options):
    """Chat"""

    model: str = Field(description="Folder or hub id of a model, or the folder of an adapter or a run")
    base: str | None = Field(None, description="Base model of an adapter; none: the one the adapter names")
    allow_other_base: bool = Field(
        False,
        description="Take a base with another fingerprint than the adapter's: the same model stored in another way",
    )
    prompt: str | None = Field(None, description="One question to answer; none: ask at the terminal")
    system: str | None = Field(None, description="System message")
    max_new_tokens: int = Field(256, ge=1, description="Tokens of an answer at most")
    temperature: float = Field(0.0, ge=0, description="Of the sampling; 0: the most likely token")
    chat_template: str | None = Field(None, description="chatml or a .jinja file, in place of the tokenizer's own")
    precision: Precision = Field("auto", description="Of the weights; auto: as stored, float32 on CPU")
    seed: int = Field(42, ge=0, lt=2**32, description="Of the sampling")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="Read weights from a pickle (.bin) where there are no safetensors; only tensors are taken"
    )


class ShowOptions(Options):
    """Show data"""

    # `json` is a method of every pydantic model, so only the option has that name.
    json_lines: bool = Field(False, alias="json", description="Print one JSON object a row and nothing else")
