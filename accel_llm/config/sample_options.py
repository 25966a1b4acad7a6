"""The options of the texts that a model writes during its pretraining, to see what it has learned."""

from pydantic import Field

from accel_llm.config.fields import Options, Texts


class SampleOptions(Options):
    """Samples"""

    sample_text: Texts = Field(
        default_factory=list,
        description="Beginnings of texts that the model continues during training, with the likeliest token each time",
    )
    sample_steps: int | None = Field(
        None, ge=1, description="Continue them every this many steps and at the end; none: a tenth of the run"
    )
    sample_tokens: int = Field(64, ge=1, description="Maximum tokens of a continuation")

    def problems(self) -> list[str]:
        return super().problems() + [
            f"{name}: {getattr(self, name)} has no text to continue; give sample_text too."
            for name in ("sample_steps", "sample_tokens")
            if name in self.model_fields_set and getattr(self, name) and not self.sample_text
        ]
