"""The options of training in groups, each with its default, its allowed values and its line in --help.

A script's options are one flat class that inherits from the groups it uses; a function that needs one group takes only
that group. pydantic checks single options. Rules between options are in each group's `problems`, so that
`parse_options` in command_line.py can report all problems at once.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import (
    Optimizer,
    Options,
    Place,
    Precision,
    Rates,
    Resume,
    Texts,
    Trackers,
)
from accel_llm.config.hub_options import HubOptions
from accel_llm.config.method import MethodOptions
from accel_llm.system.launcher import is_launched

# Options that only some optimizers or schedules use. If one is set for another choice, that is an error.
ADAMW = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
OPTIMIZERS_BY_OPTION = {"adam_beta1": (*ADAMW, "lion"), "adam_beta2": (*ADAMW, "lion"), "adam_epsilon": ADAMW}
SCHEDULES_BY_OPTION = {
    "warmup_steps": ("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "warmup_stable_decay"),
    "min_lr_rate": ("cosine_with_min_lr", "warmup_stable_decay"),
    "decay_share": ("warmup_stable_decay",),
    "decay_steps": ("warmup_stable_decay",),
}


def count_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Return the number of warmup steps: `warmup_steps`, or, below 1, that share of `total_steps`, rounded up."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * total_steps)


def count_decay_steps(decay_share: float, decay_steps: int | None, total_steps: int) -> int:
    """Return the number of the last steps in which warmup_stable_decay falls: the given one, or a share, rounded up."""
    return math.ceil(decay_share * total_steps) if decay_steps is None else decay_steps


class ModelOptions(Options):
    """Model"""

    model_name_or_path: Place | None = Field(None, description="Folder or hub id of the model to start from")
    tokenizer_name: Place | None = Field(None, description="Folder or hub id of the tokenizer; none: the model's")
    revision: str = Field("main", description="Branch, tag or commit of a model on the hub")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="Read weights from .bin files (pickle) if there are no safetensors; only tensors are read"
    )
    precision: Precision = Field("auto", description="Number format; auto: bf16 or fp16 on a GPU, fp32 on a CPU")
    attn_implementation: str = Field("auto", description="Attention in Transformers, by name; auto: the best available")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory")
    offload_embeddings: bool = Field(
        False, description="Keep the frozen input embedding in host memory; the GPU gets only the rows it needs"
    )


class OptimOptions(Options):
    """Loss, optimizer and schedule"""

    optim: Optimizer = Field("adamw", description="Name of the optimizer")
    learning_rate: float | None = Field(None, gt=0, description="Peak value; none: the default of the method")
    learning_rate_patterns: Rates = Field(
        default_factory=dict,
        description="Other peak values, as pattern=rate, for parameters whose name has a match; the first match counts",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of matrices; norms and biases never decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the optimizer's first moment")
    adam_beta2: float | None = Field(
        None, ge=0, lt=1, description="Decay of the optimizer's second moment; none: 0.999, or 0.99 for lion"
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator of AdamW")
    master_weights: Literal["float32", "stochastic_rounding"] = Field(
        "float32", description="For weights trained in bf16: keep float32 copies, or bf16 alone with random rounding"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Larger gradients are scaled down to this norm; 0: never")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "warmup_stable_decay"
    ] = Field("cosine", description="Schedule of the learning rate")
    min_lr_rate: float | None = Field(
        None, ge=0, le=1, description="Final rate as a share of the peak; none: 0.1, or 0 for warmup_stable_decay"
    )
    decay_share: float = Field(
        0.1, gt=0, le=1, description="Share of all steps in which warmup_stable_decay lowers the learning rate"
    )
    decay_steps: int | None = Field(
        None, ge=1, description="Number of last steps in which warmup_stable_decay falls; none: decay_share says it"
    )
    warmup_steps: float = Field(0.03, ge=0, description="Number of warmup steps; below 1: a share of all steps")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="NEFTune: strength of noise on input embeddings")
    loraplus_lr_ratio: float | None = Field(None, ge=1, description="LoRA+: learning rate of B divided by that of A")
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Share of each target that is spread over the vocabulary, in training only"
    )
    z_loss_coef: float = Field(
        0.0, ge=0, description="Factor of (log Z)^2, added to the loss to keep logits small, in training only"
    )

    @model_validator(mode="after")
    def _resolve(self) -> "OptimOptions":
        """Fill in the defaults that depend on another option, so that run.json can record the values in force."""
        full = not isinstance(self, MethodOptions) or not self.has_adapter
        defaults = {
            "learning_rate": 2e-5 if full else 2e-4,
            "adam_beta2": 0.99 if self.optim == "lion" else 0.999,
            "min_lr_rate": 0.0 if self.lr_scheduler_type == "warmup_stable_decay" else 0.1,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                # Not an assignment: the object is frozen, and the option must not count as set by the user.
                object.__setattr__(self, name, value)
        return self

    def problems(self) -> list[str]:
        problems = super().problems() + self._without_effect(OPTIMIZERS_BY_OPTION, "optim")
        # Only AdamW on bf16 weights rounds at random (training/own_optimizers.py).
        if self.master_weights == "stochastic_rounding":
            if isinstance(self, MethodOptions) and self.has_adapter:
                problems.append(
                    f"master_weights: method {self.method} always trains in float32; remove it, or use method full."
                )
            if self.optim != "adamw":
                problems.append(f"master_weights: stochastic_rounding needs optim adamw, but optim is {self.optim}.")
        problems += self._without_effect(SCHEDULES_BY_OPTION, "lr_scheduler_type")
        if self.decay_steps and "decay_share" in self.model_fields_set:
            problems.append(f"decay_share: {self.decay_share} and decay_steps {self.decay_steps}; give one of the two.")
        # Warmup and decay are shares of all steps, or warmup is a number of steps.
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            problems.append(
                f"warmup_steps: {self.warmup_steps} is neither a whole number of steps nor a share below 1."
            )
        share = self.warmup_steps + self.decay_share
        falls_by_share = self.lr_scheduler_type == "warmup_stable_decay" and self.decay_steps is None
        if falls_by_share and self.warmup_steps < 1 < share:
            problems.append(
                f"decay_share: {self.decay_share} and warmup_steps {self.warmup_steps} are more than all steps."
            )
        return problems


class RunOptions(HubOptions):
    """Run"""

    output_dir: Place = Field("output", description="Folder for all files of the run")
    overwrite_output_dir: bool = Field(False, description="Start anew even if output_dir holds another run")
    resume_from_checkpoint: Resume = Field(
        "auto", description="auto: continue the run in output_dir; none: start anew; or the folder of a checkpoint"
    )
    per_device_train_batch_size: int = Field(1, ge=1, description="Rows in one forward pass of one process")
    per_device_eval_batch_size: int = Field(
        0, ge=0, description="Rows in one forward pass of an evaluation; 0: as in training"
    )
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="Forward passes in a step; none: 1")
    total_batch_size: int | None = Field(None, ge=1, description="Rows in a step over all processes; sets accumulation")
    num_train_epochs: float = Field(1.0, gt=0, description="Number of passes through the data")
    max_steps: int | None = Field(
        None, ge=1, description="Number of optimizer steps; if it is given, num_train_epochs has no effect"
    )
    logging_steps: int = Field(10, ge=1, description="Log metrics every this many steps")
    eval_steps: int | None = Field(
        None,
        ge=0,
        description="Evaluate every this many steps and at the end; 0: at the end only; none: a tenth of the run",
    )
    save_steps: int | None = Field(
        None,
        ge=0,
        description="Save a checkpoint every this many steps and at the end; 0: at the end only; none: a tenth of the run, "
        "and after 30 minutes",
    )
    save_total_limit: int = Field(2, ge=1, description="Number of newest checkpoints to keep; the best one is kept too")
    save_async: bool = Field(False, description="Write checkpoints while the training goes on")
    metric_for_best_model: Literal["eval/loss", "eval/exact_match"] | None = Field(
        None, description="Keep and export the checkpoint that is best by this metric; none: export the last one"
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row without a new best by metric_for_best_model; none: never",
    )
    allow_changed: Texts = Field(
        default_factory=list, description="Options that may differ from those of the checkpoint that the run continues"
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="Number of steps with a non-finite loss or gradient to skip before the run stops"
    )
    spike_threshold: float | None = Field(
        None,
        gt=0,
        description="Skip a step whose loss or gradient norm is more than this many standard deviations above the mean of "
        "the 128 steps before; none: never",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialization, order of rows, dropout and noise")
    report_to: Trackers = Field(default_factory=list, description="Trackers that get the metrics")
    run_name: str | None = Field(None, description="Name of the run in trackers; none: the name of output_dir")
    project: str | None = Field(
        None, description="Project in trackers; none: that of the tracker's environment variable, or accel-llm"
    )
    dry_run: bool = Field(False, description="Show what the run would do, then stop before training")
    preflight: bool = Field(True, description="Try a checkpoint, the export and the longest rows before the first step")
    check_only: bool = Field(False, description="Take a few steps, say whether the run can start; nothing is kept")
    verbose: bool = Field(
        False, description="Show all settings, sample rows, the whole ledger, and with check_only all settings in force"
    )
    eval_on_start: bool = Field(False, description="Evaluate before the first step too")
    eval_generate: int = Field(
        0, ge=0, description="Number of evaluation rows to generate answers for (eval/exact_match)"
    )

    _folder_without_check: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _fit_evaluation(self) -> "RunOptions":
        """Evaluate in batches as large as those of training, which fit in memory, unless a size is given."""
        if self.per_device_eval_batch_size == 0:
            object.__setattr__(self, "per_device_eval_batch_size", self.per_device_train_batch_size)
        return self

    @model_validator(mode="after")
    def _apply_check_only(self) -> "RunOptions":
        """With `check_only`: take the steps in a temporary folder, from the beginning and without trackers."""
        if self.check_only:
            # All ranks of a launch have the same parent, so they get the same folder.
            number = os.getppid() if is_launched() else os.getpid()
            folder = str(Path(tempfile.gettempdir()) / f"accel-llm-check-{number}")
            self._folder_without_check = self.output_dir
            values = {"output_dir": folder, "overwrite_output_dir": True, "resume_from_checkpoint": "none"}
            for name, value in (values | {"eval_on_start": False, "report_to": []}).items():
                object.__setattr__(self, name, value)  # the object is frozen
        return self

    @property
    def run_folder(self) -> str:
        """The folder for the files of the run; with `check_only` the one that it has without it."""
        return self._folder_without_check or self.output_dir

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.gradient_accumulation_steps and self.total_batch_size:
            problems.append(
                f"total_batch_size: {self.total_batch_size} already sets the accumulation; "
                "give it or gradient_accumulation_steps, not both."
            )
        # Without train_files the demo runs, which has evaluation rows, or data/sources.py reports the problem.
        if isinstance(self, DataOptions) and self.train_files and not (self.eval_files or self.eval_share):
            problems += [
                f"{name}: {getattr(self, name)} has no rows to evaluate; give eval_files or eval_share too."
                for name in ("eval_steps", "eval_generate", "metric_for_best_model", "early_stopping_patience")
                if name in self.model_fields_set and getattr(self, name)
            ]
        if self.metric_for_best_model == "eval/exact_match" and not self.eval_generate:
            problems.append("metric_for_best_model: eval/exact_match needs generated answers; set eval_generate too.")
        if self.early_stopping_patience and not self.metric_for_best_model:
            problems.append(
                "early_stopping_patience: it needs a metric to compare evaluations by; set metric_for_best_model, for "
                "example eval/loss."
            )
        if self.early_stopping_patience and self.eval_steps == 0:
            problems.append("early_stopping_patience: it counts evaluations during the run, but eval_steps is 0.")
        problems += [
            f"allow_changed: {name!r} is not an option of this script; give names that --help lists."
            for name in self.allow_changed
            if name not in type(self).model_fields
        ]
        return problems


class TrainOptions(ModelOptions, DataOptions, MethodOptions, OptimOptions, RunOptions):
    """Options of every training script"""

    @property
    def virtual_tokens(self) -> int:
        count = self.method_options.get("num_virtual_tokens", 0)
        return count if isinstance(count, int) else 0


# Defaults with `overfit`; a value that the user sets wins over each of them.
OVERFIT_DEFAULTS = {
    "limit_rows": 64,
    "num_train_epochs": 60,
    "total_batch_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "eval_generate": 8,
    "eval_steps": 0,
}


class SftOptions(TrainOptions):
    """Supervised fine-tuning"""

    overfit: bool = Field(
        False, description="Learn a few rows by heart, to check that data, template and stop token work"
    )
