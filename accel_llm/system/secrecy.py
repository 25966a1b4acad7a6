"""Texts without the secrets that may have come into them: keys out of the environment, passwords out of addresses."""

import html
import json
import os
import re
from functools import cache
from urllib.parse import quote

NOT_SECRET = "***"
SHORTEST = 8  # characters: a shorter value is no key, but "true" or a word that stands anywhere
# TOKENIZERS_PARALLELISM and KEYBOARD are none.
_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?![A-Z])", re.IGNORECASE)
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"'<>]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:token|key|secret|password|passwd|credential|signature|sig)[\w.-]*=)[^\s&#\"'<>\\]+", re.IGNORECASE
)


def hide_secrets(text: str) -> str:
    """`text` with *** for the values of environment variables that are named like secrets, and for those in addresses.

    An address loses its user and password, and what a query calls token, key, secret, password, credential or signature.
    """
    secrets = frozenset(value for name, value in os.environ.items() if len(value) >= SHORTEST and _NAME.search(name))
    for written in _written(secrets):
        text = text.replace(written, NOT_SECRET)
    return _PARAMETER.sub(rf"\g<1>{NOT_SECRET}", _LOGIN.sub(rf"\g<1>{NOT_SECRET}@", text))


@cache
def _written(secrets: frozenset[str]) -> list[str]:
    """Every way in which one of them is written: plain, in JSON, in HTML, in an address; the longest first."""
    ways = [(secret, json.dumps(secret)[1:-1], html.escape(secret), quote(secret, "")) for secret in secrets]
    return sorted({way for some in ways for way in some}, key=len, reverse=True)
