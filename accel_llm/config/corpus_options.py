"""Options of launch/prepare.py: a corpus that is tokenized and packed ahead of time, and a tokenizer of its own."""

import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, Field

from accel_llm.config.data_options import TURN_OPTIONS, DataOptions
from accel_llm.config.fields import Columns, DataFormat, Options, Place, Places, Source, Sources, Texts
from accel_llm.config.text_options import TextOptions


class CorpusPart(NamedTuple):
    """The share of the sources that one process prepares: part `number` (from 1) of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def read_part(text: str) -> CorpusPart:
    """Read `3/64`.

    Raises:
        ValueError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is no part; give number/count, such as 3/64, with a number from 1 to the count")
    return CorpusPart(int(match[1]), int(match[2]))


class CorpusOptions(TextOptions, DataOptions):
    """Corpus"""

    # A corpus is text that is packed, in files of its own.
    unused: ClassVar[tuple[str, ...]] = (
        *TURN_OPTIONS,
        *("eval_files", "eval_share", "limit_rows", "packing", "order", "cache_dir", "data_format"),
    )
    script_defaults: ClassVar[dict[str, Any]] = {"overlong": "split"}

    tokenizer_name: Place = Field(description="Folder or hub id of the tokenizer")
    output_dir: Place = Field(description="Folder for the prepared corpus, and for its parts")
    part: Annotated[str, AfterValidator(lambda text: str(read_part(text)))] = Field(
        "1/1",
        description="Prepare only this share of the sources, as 3/64; then `prepare.py seal` makes one corpus of all",
    )
    deduplicate: Literal["exact", "near", "none"] = Field(
        "exact", description="Remove documents whose text was there before; near: also those that resemble one"
    )
    near_duplicate_threshold: float = Field(
        0.8, gt=0, le=1, description="Share of common token 5-grams (Jaccard) from which documents resemble each other"
    )
    decontaminate_files: Sources = Field(
        default_factory=list, description="Evaluation data: documents that share words in a row with it are removed"
    )
    decontaminate_ngram: int = Field(13, ge=2, description="How many words in a row a document may not share with it")
    fim_rate: float = Field(
        0.0, ge=0, le=1, description="Share of documents rearranged for fill-in-the-middle; for corpora of code"
    )
    fim_spm_rate: float = Field(
        0.5, ge=0, le=1, description="Share of these that have the suffix first (SPM), not the prefix (PSM)"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the packing and of fill-in-the-middle")
    revision: str = Field("main", description="Branch, tag or commit of a tokenizer on the hub")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the tokenizer")

    @property
    def share(self) -> CorpusPart:
        """The part, read."""
        return read_part(self.part)

    def problems(self) -> list[str]:
        uses = {"near_duplicate_threshold": ("near",)}
        problems = super().problems() + self._without_effect(uses, "deduplicate")
        if "decontaminate_ngram" in self.model_fields_set and not self.decontaminate_files:
            problems.append("decontaminate_ngram: it needs rows to compare with; give decontaminate_files too.")
        if "fim_spm_rate" in self.model_fields_set and not self.fim_rate:
            problems.append("fim_spm_rate: it is a share of the documents of fim_rate, which is 0; set fim_rate too.")
        if any(isinstance(source, Source) and source.weight is not None for source in self.train_files):
            problems.append(
                "train_files: a source has a weight, but a prepared corpus has every document once; prepare each source in "
                "a folder of its own, and give the weights to the script that trains."
            )
        return problems + [
            f"{name}: it has no meaning for a prepared corpus; give it to the script that trains, or remove it."
            for name in self.unused
            if name in self.model_fields_set
        ]


class SealOptions(Options):
    """Seal"""

    before_names: ClassVar[str | None] = "folders"

    folders: Places = Field(
        default_factory=list, description="Folders with the parts of one corpus, before all options; often one"
    )
    output_dir: Place | None = Field(None, description="Folder for the sealed corpus; none: the first of the folders")
    max_lost: float | None = Field(
        None, ge=0, le=1, description="Share of rows or tokens that may be lost; none: as the parts were prepared with"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.folders:
            problems.append("folders: none is given; name the output_dir of `prepare.py corpus`, or several of them.")
        return problems


class TokenizerOptions(TextOptions):
    """Tokenizer"""

    train_files: Sources = Field(
        default_factory=list, description="Text to learn from: files, folders, globs, hub datasets, or -"
    )
    output_dir: Place = Field(description="Folder for the tokenizer")
    vocab_size: int = Field(32_768, ge=257, description="Tokens in all: 256 bytes, special tokens and merges")
    min_frequency: int = Field(2, ge=1, description="How often a pair must be there to become a token")
    special_tokens: Texts = Field(
        default_factory=list, description="Further special tokens, such as <|fim_prefix|>, beside those of the template"
    )
    chat_template: Place = Field("chatml", description="Chat template: chatml, or a .jinja file")
    limit_rows: int | None = Field(None, ge=1, description="Use only this many rows, from the start of the data")
    data_format: DataFormat | None = Field(None, description="Format of the rows; none: detected")
    columns: Columns = Field(default_factory=dict, description="Names in your data, as expected=yours")
    overwrite_output_dir: bool = Field(False, description="Replace the tokenizer that output_dir holds")
