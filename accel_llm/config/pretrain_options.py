"""Options of pretraining: a model from a config, text read as a stream, and counts in tokens."""

from typing import Any, ClassVar

from pydantic import Field

from accel_llm.config.data_options import TURN_OPTIONS
from accel_llm.config.fields import Overrides, Place
from accel_llm.config.options import SCHEDULES_BY_OPTION, TrainOptions
from accel_llm.config.sample_options import SampleOptions
from accel_llm.config.text_options import TextOptions
from accel_llm.config.token_options import TokenOptions


class PretrainOptions(TextOptions, TokenOptions, SampleOptions, TrainOptions):
    """Pretraining"""

    unused: ClassVar[tuple[str, ...]] = TURN_OPTIONS
    script_defaults: ClassVar[dict[str, Any]] = {"method": "full", "overlong": "split"}

    config_name: Place | None = Field(
        None, description="Folder, hub id or family (such as llama) of a config, to train from random weights"
    )
    config_overrides: Overrides = Field(
        default_factory=dict, description="Fields of that config to change, as hidden_size=512 num_hidden_layers=8"
    )
    streaming: bool = Field(
        False,
        description="Read, encode and pack texts while the run trains; nothing is stored, and max_steps is needed",
    )
    cross_document_attention: bool = Field(
        False, description="Let the documents of a packed row see those before them; evaluation keeps them apart"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        in_tokens = {f"{name}_tokens": SCHEDULES_BY_OPTION[f"{name}_steps"] for name in ("warmup", "decay")}
        problems += self._without_effect(in_tokens, "lr_scheduler_type")
        if (self.config_name is None) == (self.model_name_or_path is None):
            count = "neither" if self.config_name is None else "both"
            problems.append(
                f"config_name: {count} of config_name (random weights) and model_name_or_path (its weights) is given; "
                "give exactly one."
            )
        if self.config_overrides and self.config_name is None:
            problems.append(
                "config_overrides: the weights of a model fix its shape; give config_name in place of model_name_or_path."
            )
        if self.cross_document_attention and not self.packing:
            problems.append(
                "cross_document_attention: without packing a row has one document; remove it, or set packing."
            )
        if self.streaming:
            problems += self._streaming_problems()
        return problems + [
            f"{name}: only conversations have turns, but pretraining trains every token; remove it."
            for name in self.unused
            if name in self.model_fields_set
        ]

    def _streaming_problems(self) -> list[str]:
        """Return a sentence for each option that needs to know all rows before the run."""
        why = {
            "max_steps": (
                self.max_steps is None,
                "no end of a stream is known before it is read; give the steps of the run",
            ),
            "eval_share": (self.eval_share > 0, "a stream is not read before the run; give eval_files instead"),
            "limit_rows": (self.limit_rows is not None, "give a source a limit_rows of its own instead"),
            "order": (self.order not in ("shuffle", "source"), "a stream has the order shuffle or source"),
            "packing": (self.packing == "static", "a stream is packed anew in each epoch; leave it out"),
        }
        return [
            f"{name}: {getattr(self, name)} is not possible with streaming: {reason}."
            for name, (found, reason) in why.items()
            if found
        ]
