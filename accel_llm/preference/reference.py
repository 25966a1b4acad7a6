"""The log-probabilities of all answers by the reference: columns of the encoded rows, computed before the first step.

The reference is the policy as it stands then, with whatever adapter, first values or quantized weights it has, in
evaluation mode; or the model that `reference_model_name_or_path` names. So training holds one model.
"""

import hashlib
import json
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator

from accel_llm.adapters.locate import find_adapter
from accel_llm.backend.collectives import sum_on_cpus, sum_over_processes, wait_for_all
from accel_llm.backend.strategy import compute_dtype, resolve_precision
from accel_llm.config.command_line import resolved_options
from accel_llm.config.method import MethodOptions
from accel_llm.config.preference_options import AnswerOptions, KtoOptions, PreferenceOptions
from accel_llm.data.answers import Pairs, as_units, collate_answers
from accel_llm.data.batches import Batch, to_device
from accel_llm.data.prepare import EncodedData
from accel_llm.data.rows import Rows, cache_folder
from accel_llm.data.stream import Collate, Stream, evaluation_batches
from accel_llm.errors import ConfigError
from accel_llm.model.evaluating import evaluating
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.log_probabilities import answer_log_probabilities
from accel_llm.model.model_names import check_model_name
from accel_llm.model.probe import sharing_obstacle
from accel_llm.model.tokenizer import configured_tokenizer, load_tokenizer
from accel_llm.preference.mismatched import collate_with_mismatched, mismatch
from accel_llm.system.disk import atomic_file

# Options that decide which function the policy is before its first step, beside the base, its precision and the method.
# A dropout is off in evaluation mode, and of an adapter its content counts, not its place.
POLICY_OPTIONS = {"add_tokens", "attn_implementation", *MethodOptions.model_fields}
POLICY_OPTIONS -= {"lora_dropout", "adapter_name_or_path"}
MISMATCHED = "-mismatched"
REFERENCE_VERSION = 1  # raise it when the code computes other log-probabilities than before


def reference_problems(options: PreferenceOptions) -> list[str]:
    """Return a sentence for each problem with the name of another reference, before any file is read."""
    try:
        if options.reference_model_name_or_path:
            check_model_name(options.reference_model_name_or_path, "reference_model_name_or_path")
    except ConfigError as error:
        return list(error.problems)
    return []


def check_reference_tokenizer(options: PreferenceOptions, token_ids: list[np.ndarray]) -> None:
    """Check that the other reference reads each id of `token_ids`, arrays of int32, as the same token.

    Raises:
        ConfigError: it has another tokenizer.
    """
    name = str(options.reference_model_name_or_path)
    seen = np.zeros(1 + max(int(ids.max()) for ids in token_ids), bool)
    for ids in token_ids:
        seen[ids] = True
    used: list[int] = np.flatnonzero(seen).tolist()
    ours = configured_tokenizer(options).convert_ids_to_tokens(used)
    theirs = load_tokenizer(name, trust_remote_code=options.trust_remote_code).convert_ids_to_tokens(used)
    for number, token, other in zip(used, ours, theirs, strict=True):
        if other is None or token != other:  # tokens of `add_tokens` are None in both
            raise ConfigError(
                f"reference_model_name_or_path: {name} has another tokenizer: token id {number} of the rows is {token!r}, "
                f"but {other!r} there; use a reference with the tokenizer of the model."
            )


def reference_name(options: PreferenceOptions) -> str:
    """Return a name made of everything that decides what the reference is, for its columns beside the encoded rows."""
    if options.reference_model_name_or_path:
        values: dict[str, Any] = {"base": model_fingerprint(options.reference_model_name_or_path, whole=True)}
    else:
        resolved = resolved_options(options)
        values = {name: resolved[name] for name in POLICY_OPTIONS}
        values["base"] = model_fingerprint(str(options.model_name_or_path), options.revision, whole=True)
        if adapter := options.adapter_name_or_path:
            values["adapter"] = model_fingerprint(str(find_adapter(adapter)), whole=True)
    # The seed also chooses mismatched answers.
    values |= {"precision": resolve_precision(options), "seed": options.seed, "version": REFERENCE_VERSION}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    return f"reference-{digest.hexdigest()[:16]}"


class Reference:
    """The rows of a run, to train and to evaluate on, and the reference's columns of them in files beside the rows."""

    def __init__(self, accelerator: Accelerator, options: AnswerOptions, data: EncodedData, stream: Stream):
        self.accelerator, self.stream = accelerator, stream
        self.options: Any = options  # those with a reference are PreferenceOptions
        self.folder = cache_folder(options) / data.fingerprint
        self.parts: dict[str, Rows | Pairs] = {"train": cast(Rows | Pairs, stream.rows)}  # no text that is streamed
        if data.eval is not None:
            self.parts["eval"] = as_units(data.eval, not isinstance(stream.rows, Pairs) or stream.rows.share_prompts)
        # KTO also compares each prompt with an answer of another row.
        if isinstance(options, KtoOptions) and options.loss_type == "kto":
            room = options.max_length - options.virtual_tokens
            for name, rows in list(self.parts.items()):
                assert isinstance(rows, Rows)
                self.parts[f"{name}{MISMATCHED}"] = mismatch(rows, options.seed, room)
        self.columns: dict[str, np.ndarray] = {}

    def find(self, resumed: bool) -> None:
        """Read the columns if all of them are there. Otherwise the policy, or another model, has to compute them.

        Raises:
            ConfigError: the run is `resumed`, and the policy that was its reference is gone.
        """
        if not self.options.needs_reference:
            return
        name = reference_name(self.options)
        self.files = {part: self.folder / f"{name}-{part}.bin" for part in self.parts}
        complete = all(map(self._is_written, self.parts))
        if sum_on_cpus(self.accelerator, [float(complete)])[0] == self.accelerator.num_processes:
            self.columns = {part: np.fromfile(path, np.float64) for part, path in self.files.items()}
            self.accelerator.print(f"reference: log-probabilities read from {self.folder}/{name}-*.bin")
        elif resumed and not self.options.reference_model_name_or_path:
            raise ConfigError(
                f"resume_from_checkpoint: the log-probabilities of the reference, {self.folder}/{name}-*.bin, are missing, "
                "and the model of the checkpoint is no longer the reference; give cache_dir and the options that the run "
                "had, or start anew with resume_from_checkpoint: none."
            )

    @property
    def missing(self) -> bool:
        """Whether the columns are still to be computed."""
        return self.options.needs_reference and not self.columns

    def compute(self, model: Any, share: bool) -> None:
        """Compute the columns by `model`, which may be wrapped, and write them; all processes must call it.

        `share`: both answers of a pair have their prompt in common, see `can_share`.
        """
        count = sum(len(_table(rows)) for rows in self.parts.values())
        self.accelerator.print(f"reference: computing the log-probabilities of {count:,} answers")
        for part, rows in self.parts.items():
            rows = replace(rows, share_prompts=share) if isinstance(rows, Pairs) else rows
            pad = self.stream.pad_token_id
            column = reference_columns(self.accelerator, model, rows, self.options, pad)
            self.columns[part] = self._first_written(part, column)
            # One process of each machine writes; machines may have a disk in common.
            if self.accelerator.is_local_main_process and not self._is_written(part):
                with atomic_file(self.files[part]) as file:
                    file.write(self.columns[part].tobytes())
        wait_for_all()

    def _is_written(self, part: str) -> bool:
        path = self.files[part]
        return path.is_file() and path.stat().st_size == 8 * len(_table(self.parts[part]))

    def _first_written(self, part: str, column: np.ndarray) -> np.ndarray:
        """Return the column of another run, if one has been written meanwhile, else `column`; the same on all processes.

        Both runs find it when they are resumed, and its last bits depend on the number of processes that computed it.
        """
        if self.accelerator.is_main_process and self._is_written(part):
            column = np.fromfile(self.files[part], np.float64)
        own = column if self.accelerator.is_main_process else np.zeros_like(column)
        return sum_over_processes(self.accelerator, torch.from_numpy(own)).cpu().numpy()

    def can_share(self, model: Any) -> bool:
        """Return whether both answers of a pair can have their prompt in common; it is tested on `model`."""
        rows = self.stream.rows
        if not isinstance(rows, Pairs) or not rows.share_prompts:
            return False
        options, device = self.options, self.accelerator.device
        dtype = torch.int8 if options.load_in_8bit else compute_dtype(options)
        obstacle = sharing_obstacle(model, device, dtype, options.max_length)
        if obstacle:
            self.accelerator.print(f"prompts of pairs are computed for each answer: {obstacle}")
        return obstacle is None

    def rows(self, part: str, share_prompts: bool) -> tuple[Rows | Pairs, Collate]:
        """Return the rows of a part with their columns, and how to make batches of them."""
        rows = self._with_column(part)
        if isinstance(rows, Pairs):
            return replace(rows, share_prompts=share_prompts), collate_answers
        if f"{part}{MISMATCHED}" not in self.parts:
            return rows, collate_answers
        return rows, partial(collate_with_mismatched, mismatched=self._with_column(f"{part}{MISMATCHED}"))

    def _with_column(self, part: str) -> Any:
        rows = self.parts[part]
        table = replace(_table(rows), reference=self.columns.get(part))
        return replace(rows, rows=table) if isinstance(rows, Pairs) else table


def _table(rows: Rows | Pairs) -> Rows:
    return rows.rows if isinstance(rows, Pairs) else rows


def reference_columns(
    accelerator: Accelerator, model: Any, rows: Rows | Pairs, options: PreferenceOptions, pad_token_id: int
) -> np.ndarray:
    """Return the sum of log p over the labels of each row by `model`, float64 [rows].

    All processes must call it. Each row is computed once, by one of them, in evaluation mode and packed as rows are to
    train. The model may be wrapped.

    Raises:
        ConfigError: a sum is not finite.
    """
    table = _table(rows)
    column = torch.zeros(len(table), dtype=torch.float64, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = evaluation_batches(rows, options, rank, world, pad_token_id, _collate_with_numbers, "reference")
    with evaluating(model), accelerator.autocast():
        for batch in batches:
            batch = to_device(batch, accelerator.device)
            column[batch["row_numbers"]] = answer_log_probabilities(model, batch).sums
    values = sum_over_processes(accelerator, column).cpu().numpy()
    if not np.isfinite(values).all():
        k = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ConfigError(
            f"model_name_or_path: the reference's log-probability of {table.name(k)} is {values[k]}, so nothing can be "
            "compared with it; use another model, or precision fp32."
        )
    return values


def _collate_with_numbers(
    rows: Rows | Pairs, units: list[int], packed: bool, pad_token_id: int, virtual: int = 0
) -> Batch:
    """Make a batch of answers; `row_numbers`, int64 [answers], are the rows that they are."""
    numbers = [row for k in units for row in (2 * k, 2 * k + 1)] if isinstance(rows, Pairs) else units
    batch = collate_answers(rows, units, packed, pad_token_id, virtual)
    return batch | {"row_numbers": torch.tensor(numbers, dtype=torch.int64)}
