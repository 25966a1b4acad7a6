"""Options of plain text: where it is in a row, and what a row of a .txt file is."""

from pydantic import Field, model_validator

from accel_llm.config.fields import Options, SampleBy, Source


def with_text_column(columns: dict[str, str], text_column: str) -> dict[str, str]:
    """Return the names that columns have in the data (`columns`), and with them that of the text."""
    return columns if text_column == "text" else {**columns, "text": text_column}


class TextOptions(Options):
    """Text"""

    text_column: str = Field("text", description="Column with the text")
    sample_by: SampleBy | None = Field(
        None,
        description="A document of a .txt file: a line, a paragraph (up to an empty line), or document (the whole file); "
        "none: a line",
    )

    @model_validator(mode="after")
    def _tell_sources(self) -> "TextOptions":
        """Put `sample_by` into each source that has none of its own."""
        for name in ("train_files", "eval_files", "decontaminate_files"):
            if self.sample_by and getattr(self, name, None):
                found = [self._with_sample_by(source) for source in getattr(self, name)]
                object.__setattr__(self, name, found)  # the object is frozen
        return self

    def _with_sample_by(self, source: str | Source) -> Source:
        if isinstance(source, Source):
            return source.model_copy(update={"sample_by": source.sample_by or self.sample_by})
        return Source.model_construct(
            path=source, sample_by=self.sample_by
        )  # pydantic refuses names that are not UTF-8
