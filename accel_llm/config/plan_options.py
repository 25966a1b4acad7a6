"""The options of launch/plan.py, beside those of the training script that it plans."""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from accel_llm.config.fields import Options, Place

_CARDS = re.compile(r"(?P<size>\d+(?:\.\d+)?)\s*g(?:i?b)?(?:\s*[x*]\s*(?P<count>\d+))?", re.IGNORECASE)
_COUNTED = re.compile(r"(?P<count>\d+)\s*[x*]\s*(?P<size>\d+(?:\.\d+)?)\s*g(?:i?b)?", re.IGNORECASE)
SPELLINGS = "the memory of a card, such as 24GB, and how many there are, such as 24GB x 2"


class Cards(NamedTuple):
    """The memory of each GPU in GB (2^30 bytes), and their number."""

    gigabytes: float
    count: int


def parse_cards(text: str) -> Cards:
    """Read `24GB`, `24GB x 2` or `2 x 24GB`.

    Raises:
        ValueError: it is something else.
    """
    match = _CARDS.fullmatch(text.strip()) or _COUNTED.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not understood; give {SPELLINGS}")
    cards = Cards(float(match["size"]), int(match["count"] or 1))
    if not 0 < cards.gigabytes <= 10_000 or not 1 <= cards.count <= 10_000:
        raise ValueError(f"{text!r} is no possible number of cards; give {SPELLINGS}")
    return cards


def _join_words(value: Any) -> Any:
    """Join the words of `--gpu 24GB x 2`, which needs no quotes."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _check_cards(value: str | None) -> str | None:
    if value is not None:
        parse_cards(value)
    return value


class PlanOptions(Options):
    """Plan"""

    gpu: Annotated[str | None, BeforeValidator(_join_words), AfterValidator(_check_cards)] = Field(
        None, description="Memory of a card and their number, as 24GB x 2; none: the GPUs of this machine"
    )
    config_file: Place | None = Field(
        None, description="Launch YAML to plan for, such as accelerate_configs/zero3.yaml; none: all of them"
    )
