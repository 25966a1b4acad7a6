"""What a conversation becomes: rows of token ids with labels, and what happened to its turns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodedRow:
    """One row of token ids with labels and weights, all of the same length.

    `labels[k]` is `input_ids[k]` if position k is trained, else -100 (not shifted). `weights[k]` is the weight of that
    label in the loss; None if all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """The rows of a conversation, and what happened to its assistant turns.

    `lost` counts the turns that are not trained, by reason. `shown_as_history` counts the turns that are trained
    as the conversation shows them, without the words that the template puts around a last answer only (Qwen3's empty
    think block). `without_reasoning` counts the turns that are trained without their reasoning, because the template
    does not write it. `closed_thoughts` counts the turns whose thought, opened by the prompt, is closed at once.
    `variable` is the name of the template's variable that was set for the reasoning, "" if none was.
    `left_out` names what the template does not write, as in `arrival`. `rendered_before` says that a message holds
    the template's own control tokens.
    """

    rows: list[EncodedRow]
    lost: dict[str, int]
    shown_as_history: int = 0
    without_reasoning: int = 0
    closed_thoughts: int = 0
    left_out: tuple[str, ...] = ()
    rendered_before: bool = False
    variable: str = ""
