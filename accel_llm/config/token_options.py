"""The options that count a step, a run and its schedule in tokens, and the growth of the step at the start of a run."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from accel_llm.config.fields import Options

# The options in tokens, and those of which each of them takes the place.
IN_PLACE_OF = {
    "tokens_per_step": ("total_batch_size", "gradient_accumulation_steps"),
    "max_tokens": ("max_steps", "num_train_epochs"),
    "warmup_tokens": ("warmup_steps",),
    "decay_tokens": ("decay_steps", "decay_share"),
    "batch_warmup_tokens": ("batch_warmup_steps",),
}


def _parse_count(value: Any) -> Any:
    """Read a number of tokens with a unit: 500k, 1.5M, 20B, 2T; or in the way of computers: 2e9, 1_000_000."""
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", str(value).strip().lower())
    if match is None or isinstance(value, bool):
        return value
    count = float(match[1]) * 1000 ** " kmbt".index(match[2] or " ")
    return int(count) if count == int(count) else value


Tokens = Annotated[int, Field(ge=1), BeforeValidator(_parse_count, json_schema_input_type=int | str)]


class TokenOptions(Options):
    """Steps and schedule in tokens"""

    tokens_per_step: Tokens | None = Field(
        None, description="Tokens in a step over all processes, rows taken as full; sets total_batch_size"
    )
    max_tokens: Tokens | None = Field(None, description="Tokens to train on, rows taken as full; sets max_steps")
    warmup_tokens: Tokens | None = Field(None, description="Tokens in which the learning rate rises; sets warmup_steps")
    decay_tokens: Tokens | None = Field(None, description="Tokens in which the learning rate falls; sets decay_steps")
    batch_warmup_steps: int = Field(
        0, ge=0, description="Number of first steps in which the rows of a step grow, in equal parts, to all of them"
    )
    batch_warmup_tokens: Tokens | None = Field(
        None, description="Tokens in which the rows of a step grow; sets batch_warmup_steps"
    )

    @model_validator(mode="after")
    def _fill_rows(self: Any) -> Any:
        """Set the rows of a step that `tokens_per_step` means. `data/step_sizes.py` counts the other tokens in steps."""
        if self.tokens_per_step and self.total_batch_size is None and self.gradient_accumulation_steps is None:
            # Not an assignment: the object is frozen, and the option must not count as set by the user.
            object.__setattr__(self, "total_batch_size", max(1, self.tokens_per_step // self.max_length))
        return self

    def problems(self: Any) -> list[str]:
        given = [name for name in IN_PLACE_OF if getattr(self, name) is not None]
        problems = super().problems() + [
            f"{name}: {getattr(self, name)} takes the place of {other} {getattr(self, other)}; give one of the two."
            for name in given
            for other in IN_PLACE_OF[name]
            if other in self.model_fields_set and getattr(self, other)
        ]
        if given and not self.packing:
            problems.append(
                f"{given[0]}: {getattr(self, given[0])} tokens are those of full rows, which only packing makes; set "
                "packing: true, or give steps and rows."
            )
        per_step, length = self.tokens_per_step or 0, self.max_length
        if per_step % length:
            near = [str(rows * length) for rows in (per_step // length, per_step // length + 1) if rows]
            problems.append(
                f"tokens_per_step: {per_step} is no multiple of max_length {length}; give {' or '.join(near)}."
            )
        return problems
