"""The option groups: what can be set, its default, its range and one documented line for each field.

A script's config is one flat class that inherits from the groups it uses; a helper is typed to take only its group.
Fields are checked one by one by pydantic; what holds between fields stands in each group's `problems`, so that
`config.parse` can report everything that is wrong at once.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from accel_llm.config.fields import (
    Columns,
    DataFormat,
    Optimizer,
    Options,
    Packing,
    Precision,
    Resume,
    Source,
    Sources,
    TargetModules,
    Texts,
    Trackers,
    Variables,
)
from accel_llm.system.launcher import is_launched

# What each option is for, where not every choice uses it: set for another choice, it is an error, not ignored.
METHODS_OF_OPTION = {
    **dict.fromkeys(["lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules"], ("lora", "qlora")),
    **dict.fromkeys(["modules_to_save", "init_lora_weights", "use_dora", "use_rslora"], ("lora", "qlora")),
    **dict.fromkeys(["loraplus_lr_ratio", "adapter_name_or_path"], ("lora", "qlora")),
    "load_in_8bit": ("lora",),
}
ADAMW = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
OPTIMIZERS_OF_OPTION = {"adam_beta1": (*ADAMW, "lion"), "adam_beta2": (*ADAMW, "lion"), "adam_epsilon": ADAMW}
SCHEDULES_OF_OPTION = {
    "warmup_steps": ("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "warmup_stable_decay"),
    "min_lr_rate": ("cosine_with_min_lr", "warmup_stable_decay"),
    "decay_share": ("warmup_stable_decay",),
}

# Only conversations have what these are about.
TURN_OPTIONS = (
    "train_on",
    "train_on_eos",
    "split_turns",
    "chat_template",
    "chat_template_kwargs",
    "add_tokens",
    "allow_special_in_text",
)


class ModelOptions(Options):
    """Model"""

    model_name_or_path: str | None = Field(None, description="Folder or hub id of the model to start from")
    tokenizer_name: str | None = Field(None, description="Folder or hub id of the tokenizer, if not the model's own")
    revision: str = Field("main", description="Branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="Read weights from a pickle (.bin) where there are no safetensors; only tensors are taken"
    )
    precision: Precision = Field("auto", description="Of the computation; auto: bf16 where the device is good at it")
    attn_implementation: str = Field("auto", description="Attention of Transformers by name; auto: the best available")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory")


class DataOptions(Options):
    """Data"""

    train_files: Sources = Field(
        default_factory=list, description="Files, folders, globs, hub datasets or - (standard input) to train on"
    )
    eval_files: Sources = Field(default_factory=list, description="The same, to evaluate on")
    eval_share: float = Field(0.0, ge=0, lt=1, description="Share of the training rows held out to evaluate on")
    limit_rows: int | None = Field(None, ge=1, description="Use only the first rows of the training data")
    data_format: DataFormat | None = Field(None, description="Shape of the rows; none: recognised on sight")
    columns: Columns = Field(
        default_factory=dict, description="Other names of columns: instruction=question output=reply"
    )
    on_bad_row: Literal["error", "drop"] = Field("error", description="What a row that is not right does")
    chat_template: str | None = Field(None, description="chatml or a .jinja file, in place of the tokenizer's own")
    chat_template_kwargs: Variables = Field(
        default_factory=dict, description="Variables of the chat template: enable_thinking=false; a row's own win"
    )
    add_tokens: bool = Field(False, description="Add the template's control tokens to a tokenizer that lacks them")
    allow_special_in_text: bool = Field(False, description="Control tokens in the text of a message are control tokens")
    train_on: Literal["assistant", "last_assistant", "all"] = Field("assistant", description="Whose turns are trained")
    train_on_eos: Literal["turn", "last", "none"] = Field(
        "turn", description="Which end-of-turn tokens are trained: of every trained turn, of the last one, of none"
    )
    split_turns: bool = Field(
        False, description="A row of its own for each turn that the template shows differently once others follow"
    )
    max_length: int = Field(2048, ge=2, description="Tokens in a row at most; packed rows are filled up to it")
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        "drop", description="What becomes of a row longer than max_length"
    )
    max_lost: float = Field(0.01, ge=0, le=1, description="Share of rows or trained tokens that may be lost")
    packing: Packing = Field(
        "per_epoch",
        description="Several documents in one row, which never see each other; static: the same ones in every epoch",
    )
    order: Literal["shuffle", "length", "source"] = Field(
        "shuffle", description="Of the rows: drawn anew each epoch, the shortest first, or as the sources have them"
    )
    preprocessing_num_workers: int | None = Field(None, ge=1, description="Processes that encode rows; none: one")
    cache_dir: str | None = Field(None, description="Where encoded rows are kept; none: accel_llm in HF_HOME")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.eval_files and self.eval_share:
            found.append(f"eval_share: {self.eval_share} cannot be combined with eval_files; give one of the two")
        weights = [isinstance(source, Source) and source.weight is not None for source in self.train_files]
        if any(weights) and not all(weights):
            found.append("train_files: some sources have a weight and some have none; give it to all or to none")
        if any(weights) and self.order == "source":
            found.append("order: source takes the rows as they come, so it cannot be combined with weights")
        return found


class MethodOptions(Options):
    """Method"""

    method: Literal["full", "lora", "qlora"] = Field(
        "lora", description="full: all weights; lora: an adapter; qlora: an adapter on a 4-bit base"
    )
    load_in_8bit: bool = Field(False, description="lora on a base in 8 bits")
    adapter_name_or_path: str | None = Field(
        None, description="Adapter to go on training from, with a fresh optimizer; its own settings hold"
    )
    lora_r: int = Field(16, ge=1, description="Rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="Scale of the adapter: alpha / r, or alpha / sqrt(r) with rsLoRA")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained as well")
    lora_target_modules: TargetModules = Field(
        "all-linear", description="Adapted modules: all-linear, a list of names, or a pattern for the whole name"
    )
    modules_to_save: Texts = Field(default_factory=list, description="Modules trained and saved whole, by name")
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "olora", "pissa"] = Field(
        True, description="First values of the adapter; true: A Kaiming-uniform, B zero; false: both random"
    )
    use_dora: bool = Field(False, description="DoRA: learn the magnitude of each weight apart from its direction")
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(r)")

    def problems(self) -> list[str]:
        found = super().problems() + self._misplaced(METHODS_OF_OPTION, "method")
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            found.append(f"lora_r: {self.lora_r} is odd; init_lora_weights orthogonal takes an even rank")
        if self.init_lora_weights == "pissa" and (self.method == "qlora" or self.load_in_8bit):
            found.append("init_lora_weights: pissa needs a base that is not quantised; give method lora or olora here")
        return found


class OptimOptions(Options):
    """Loss, optimizer and schedule"""

    optim: Optimizer = Field("adamw", description="Optimizer by name")
    learning_rate: float | None = Field(None, gt=0, description="At its peak; none: 2e-4 with an adapter, else 2e-5")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of matrices; norms and biases never decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment")
    adam_beta2: float | None = Field(
        None, ge=0, lt=1, description="Of the second moment; none: 0.999, or 0.99 for Lion"
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator of AdamW")
    master_weights: Literal["float32", "stochastic_rounding"] = Field(
        "float32",
        description="With method full in bf16: float32 copies, or bf16 weights alone that are rounded up or down at random",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0: never")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "warmup_stable_decay"
    ] = Field("cosine", description="Course of the learning rate")
    min_lr_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Where the rate ends, as a share of its peak; none: 0.1, or 0 for warmup_stable_decay",
    )
    decay_share: float = Field(0.1, gt=0, le=1, description="Share of all steps in which warmup_stable_decay decays")
    warmup_steps: float = Field(0.03, ge=0, description="Steps of warmup; below 1: a share of all steps")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="NEFTune: noise on the input embeddings")
    loraplus_lr_ratio: float | None = Field(None, ge=1, description="LoRA+: learning rate of B over that of A")
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Share of each target that is spread over the vocabulary; in training only"
    )
    z_loss_coef: float = Field(
        0.0, ge=0, description="Of (log Z)^2, added to each target's loss to keep logits small; in training only"
    )

    @model_validator(mode="after")
    def _resolve(self) -> "OptimOptions":
        """Fill in the defaults that depend on another option, so that what is in force can be read and recorded."""
        full = not isinstance(self, MethodOptions) or self.method == "full"
        defaults = {
            "learning_rate": 2e-5 if full else 2e-4,
            "adam_beta2": 0.99 if self.optim == "lion" else 0.999,
            "min_lr_rate": 0.0 if self.lr_scheduler_type == "warmup_stable_decay" else 0.1,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                # Not an assignment: the object is frozen, and the field must not count as set by the person.
                object.__setattr__(self, name, value)
        return self

    def problems(self) -> list[str]:
        found = super().problems() + self._misplaced(OPTIMIZERS_OF_OPTION, "optim")
        if self.master_weights == "stochastic_rounding":
            if isinstance(self, MethodOptions) and self.method != "full":
                found.append(f"master_weights: an adapter is float32 always, method is {self.method}; leave it out")
            if self.optim != "adamw":
                found.append(f"master_weights: only optim adamw rounds at random, optim is {self.optim}")
        found += self._misplaced(SCHEDULES_OF_OPTION, "lr_scheduler_type")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            found.append(f"warmup_steps: {self.warmup_steps} is neither a whole number of steps nor a share below 1")
        share = self.warmup_steps + self.decay_share
        if self.lr_scheduler_type == "warmup_stable_decay" and self.warmup_steps < 1 < share:
            found.append(
                f"decay_share: {self.decay_share} and warmup_steps {self.warmup_steps} are more than all steps"
            )
        return found


class RunOptions(Options):
    """Run"""

    output_dir: str = Field("output", description="Folder for everything that the run writes")
    overwrite_output_dir: bool = Field(False, description="Start anew in an output_dir that holds another run")
    resume_from_checkpoint: Resume = Field(
        "auto", description="auto: continue what output_dir holds; none: start anew; or the checkpoint's folder"
    )
    per_device_train_batch_size: int = Field(1, ge=1, description="Rows in a forward pass of one process")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows in a forward pass of one process, evaluating")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="Forward passes in a step; none: 1")
    total_batch_size: int | None = Field(None, ge=1, description="Rows in a step over all processes; sets accumulation")
    num_train_epochs: float = Field(1.0, gt=0, description="Times the data is gone through")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; where given, it counts and num_train_epochs does not"
    )
    logging_steps: int = Field(10, ge=1, description="Steps from one line of metrics to the next")
    eval_steps: int | None = Field(None, ge=1, description="Steps from one evaluation to the next; none: at the end")
    save_steps: int | None = Field(None, ge=1, description="Steps from one checkpoint to the next; none: at the end")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept, the newest ones; the best one besides")
    save_async: bool = Field(False, description="Write checkpoints while training goes on")
    metric_for_best_model: Literal["eval/loss", "eval/exact_match"] | None = Field(
        None, description="Keep the checkpoint that is best by this and export it; none: export the last"
    )
    allow_changed: Texts = Field(
        default_factory=list, description="Options that may differ from those of the checkpoint that is continued"
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="Steps whose loss or gradient is not finite that are skipped before the run stops"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Of initialisation, order, dropout and noise")
    report_to: Trackers = Field(default_factory=list, description="Trackers that get the metrics; none: no tracker")
    run_name: str | None = Field(None, description="Name of the run in trackers and run.json")
    dry_run: bool = Field(False, description="Show settings, rows, ledger and steps, then stop")
    check_only: bool = Field(False, description="Take one step, show what is in force, then stop; nothing is kept")
    eval_on_start: bool = Field(False, description="Evaluate before the first step as well")
    eval_generate: int = Field(0, ge=0, description="Evaluation rows answered by generating, for eval/exact_match")

    @model_validator(mode="after")
    def _rehearse(self) -> "RunOptions":
        """With `check_only`: one step in a folder that will not stay, with nobody told of it."""
        if self.check_only:
            # The ranks of a launch have one parent.
            number = os.getppid() if is_launched() else os.getpid()
            folder = str(Path(tempfile.gettempdir()) / f"accel-llm-check-{number}")
            values = {"output_dir": folder, "overwrite_output_dir": True, "resume_from_checkpoint": "none"}
            for name, value in (values | {"max_steps": 1, "eval_on_start": False, "report_to": []}).items():
                object.__setattr__(self, name, value)
        return self

    def problems(self) -> list[str]:
        found = super().problems()
        if self.gradient_accumulation_steps and self.total_batch_size:
            found.append(
                f"total_batch_size: {self.total_batch_size} sets the accumulation already; "
                "give it or gradient_accumulation_steps, not both"
            )
        if isinstance(self, DataOptions) and self.train_files and not (self.eval_files or self.eval_share):
            found += [
                f"{name}: {getattr(self, name)} has nothing to evaluate; give eval_files or eval_share as well"
                for name in ("eval_steps", "eval_generate", "metric_for_best_model")
                if name in self.model_fields_set and getattr(self, name)
            ]
        if self.metric_for_best_model == "eval/exact_match" and not self.eval_generate:
            found.append("metric_for_best_model: eval/exact_match needs answers; set eval_generate as well")
        found += [
            f"allow_changed: {name!r} is no option of this script"
            for name in self.allow_changed
            if name not in type(self).model_fields
        ]
        return found


class TrainOptions(ModelOptions, DataOptions, MethodOptions, OptimOptions, RunOptions):
    """What every training script takes."""


# Defaults of `overfit`; a person's own value wins over each of them.
OVERFIT_DEFAULTS = {
    "limit_rows": 64,
    "num_train_epochs": 60,
    "total_batch_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "eval_generate": 8,
}


class SftOptions(TrainOptions):
    """Supervised fine-tuning"""

    overfit: bool = Field(False, description="Learn the rows by heart, as a proof that data, template and stop work")


class PretrainOptions(TrainOptions):
    """Pretraining"""

    config_name: str | None = Field(None, description="Folder or hub id of a config: train from random weights")
    text_column: str = Field("text", description="Column that holds the text")

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.config_name is None) == (self.model_name_or_path is None):
            given = "neither" if self.config_name is None else "both"
            found.append(
                f"config_name: {given} of config_name (random weights) and model_name_or_path (its weights) is given; "
                "give exactly one"
            )
        unused = [name for name in TURN_OPTIONS if name in self.model_fields_set]
        return found + [f"{name}: only conversations have turns; pretraining trains every token" for name in unused]
