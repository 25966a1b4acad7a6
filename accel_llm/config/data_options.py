"""The options about data: sources, rows, the chat template, what is trained, and packing."""

from typing import Literal

from pydantic import Field

from accel_llm.config.fields import Columns, DataFormat, Options, Packing, Place, Source, Sources, Variables

# Options that only make sense for conversations.
TURN_OPTIONS = (
    "train_on",
    "train_on_eos",
    "split_turns",
    "open_thought",
    "chat_template",
    "chat_template_kwargs",
    "add_tokens",
    "allow_special_in_text",
)


class DataOptions(Options):
    """Data"""

    train_files: Sources = Field(
        default_factory=list, description="Training data: files, folders, globs, hub datasets, or - for standard input"
    )
    eval_files: Sources = Field(default_factory=list, description="Evaluation data, in the same forms")
    eval_share: float = Field(0.0, ge=0, lt=1, description="Share of the training rows that is held out for evaluation")
    limit_rows: int | None = Field(None, ge=1, description="Use only this many rows, from the start of the data")
    data_format: DataFormat | None = Field(None, description="Format of the rows; none: detected")
    columns: Columns = Field(
        default_factory=dict,
        description="Names in your data, as expected=yours (instruction=question), or role:yours=ours",
    )
    on_bad_row: Literal["error", "drop"] = Field("error", description="Stop at an invalid row, or leave it out")
    chat_template: Place | None = Field(
        None, description="chatml, a .jinja file, or a name of the tokenizer's; none: its own"
    )
    chat_template_kwargs: Variables = Field(
        default_factory=dict, description="Template variables, as enable_thinking=false; values in a row override them"
    )
    add_tokens: bool = Field(False, description="Add the template's control tokens to a tokenizer that lacks them")
    allow_special_in_text: bool = Field(
        False, description="Read control tokens that are written in a message as control tokens, not as text"
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field("assistant", description="Which turns are trained")
    train_on_eos: Literal["turn", "last", "none"] = Field(
        "turn", description="Which end-of-turn tokens are trained: of every trained turn, of the last one, or none"
    )
    split_turns: bool | Literal["auto"] = Field(
        False,
        description="Rows of their own for turns that the template changes once others follow; auto: for lost ones only",
    )
    open_thought: Literal["refuse", "close", "history"] = Field(
        "refuse",
        description="If the prompt opens a thought that an answer lacks: do not train it, close the thought at once, or "
        "train it as the template shows earlier turns",
    )
    max_length: int = Field(2048, ge=2, description="Maximum tokens in a row; packed rows are filled up to it")
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        "drop",
        description="A row longer than max_length: leave it out (drop), keep its turns up to the last whole answer that fits "
        "(truncate), train it in pieces (split), or stop (error)",
    )
    max_lost: float = Field(
        0.01, ge=0, le=1, description="Share of rows, trained tokens or turns that may be lost before the run stops"
    )
    packing: Packing = Field(
        "per_epoch",
        description="Pack several separate documents into each row; static: the same rows in each epoch; false: never",
    )
    order: Literal["shuffle", "group_by_length", "length", "source"] = Field(
        "shuffle",
        description="Order of the rows: shuffled anew each epoch, shuffled with rows of similar length together, the "
        "shortest first, or as in the sources",
    )
    preprocessing_num_workers: int | None = Field(None, ge=1, description="Processes that encode rows; none: 1")
    cache_dir: Place | None = Field(None, description="Folder for encoded rows; none: accel_llm in HF_HOME")

    @property
    def virtual_tokens(self) -> int:
        """The tokens that the method puts before each document. They count against `max_length`."""
        return 0

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.eval_files and self.eval_share:
            problems.append(f"eval_share: {self.eval_share} cannot be combined with eval_files; give one of the two.")
        # Weights of sources: all or none, and only if the order is free.
        weights = [isinstance(source, Source) and source.weight is not None for source in self.train_files]
        if any(weights) and not all(weights):
            problems.append("train_files: only some of the sources have a weight; give one to all or to none.")
        if any(weights) and self.order == "source":
            problems.append("order: source ignores weights of sources; remove the weights, or give another order.")
        if self.packing and self.order == "group_by_length":
            problems.append(
                "order: group_by_length saves padding, but packed rows need none; set packing: false, or leave order out."
            )
        return problems
