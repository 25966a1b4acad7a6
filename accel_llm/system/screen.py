"""Whether what a program prints is seen on a terminal with colors."""

import os
from typing import TextIO

DIM, NO_STYLE = "\x1b[2m", "\x1b[0m"


def shows_styles(stream: TextIO) -> bool:
    """Tell whether `stream` is a terminal that shows dim and bold text; NO_COLOR and TERM=dumb say that it is not."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
