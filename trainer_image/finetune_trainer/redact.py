"""Remove secrets from text that leaves the pod: logs, log tails, failure messages."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

MASK = "[redacted]"
MIN_LENGTH = 6
"""Shorter values would mask ordinary words."""

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY", re.IGNORECASE)
_NOT_SECRET_NAME = re.compile(r"(_FILE|_PATH|_DIR)$", re.IGNORECASE)
"""Where a secret is kept is none. The value does not tell: an AWS secret key may begin with a slash."""
_SECRET_SHAPES = re.compile(
    r"AKIA[0-9A-Z]{16}"
    r"|hf_[A-Za-z0-9]{20,}"
    r"|(?i:bearer\s+)[A-Za-z0-9._~+/=-]{8,}"
    r"|(?i:x-amz-(?:signature|security-token|credential)=)[^&\s\"']+"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


class Redactor:
    """Knows the secrets of this process' environment: by the names of their variables, or because it is told."""

    def __init__(self, environment: dict[str, str] | None = None, secret_names: Collection[str] = ()) -> None:
        """`secret_names`: variables that come from Secrets, whatever they are called."""
        environment = dict(os.environ) if environment is None else environment
        values = {
            value
            for name, value in environment.items()
            if (name in secret_names or _sounds_secret(name)) and len(value) >= MIN_LENGTH
        }
        # The longest first: a secret may contain another one.
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return _SECRET_SHAPES.sub(MASK, text)


def _sounds_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET_NAME.search(name)
