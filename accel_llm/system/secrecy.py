"""Removes secrets from texts: keys in environment variables, and passwords and tokens in URLs."""

import html
import json
import os
import re
from functools import cache
from urllib.parse import quote

MASK = "***"
MIN_SECRET_LENGTH = 8  # characters: a shorter value is not a key, but "true" or a common word
# The last group keeps names such as TOKENIZERS_PARALLELISM and KEYBOARD out.
_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?![A-Z])", re.IGNORECASE)
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"'<>]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:token|key|secret|password|passwd|credential|signature|sig)[\w.-]*=)[^\s&#\"'<>\\]+", re.IGNORECASE
)


def names_secret(variable: str) -> bool:
    """Return whether an environment variable has the name of a secret, such as HF_TOKEN."""
    return _NAME.search(variable) is not None


def hide_secrets(text: str) -> str:
    """Replace secrets in `text` by ***: values of environment variables with names of secrets, and secrets in URLs.

    A URL loses its user and password, and the values of query parameters that are called token, key, secret, password,
    credential or signature.
    """
    secrets = frozenset(
        value for name, value in os.environ.items() if len(value) >= MIN_SECRET_LENGTH and names_secret(name)
    )
    for spelling in _spellings(secrets):
        text = text.replace(spelling, MASK)
    return _PARAMETER.sub(rf"\g<1>{MASK}", _LOGIN.sub(rf"\g<1>{MASK}@", text))


@cache
def _spellings(secrets: frozenset[str]) -> list[str]:
    """Return each secret as plain text, in JSON, in HTML and in a URL; the longest first."""
    spellings = [(secret, json.dumps(secret)[1:-1], html.escape(secret), quote(secret, "")) for secret in secrets]
    return sorted({spelling for group in spellings for spelling in group}, key=len, reverse=True)
