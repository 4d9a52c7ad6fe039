"""Text without secrets: errors of a library may quote the key or the address that it was given."""

from __future__ import annotations

import os
import re

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""Names of environment variables that may hold a secret."""
_USER = re.compile(r"://[^/@\s]+@")
_SHORTEST = 6


def hide_secrets(text: str) -> str:
    """Replace the values of such variables, and credentials in addresses, by `***`."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER.sub("://***@", text)
