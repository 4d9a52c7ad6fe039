"""A server or a controller of a test: it lives until somebody ends it."""

from __future__ import annotations

import signal


def main() -> None:
    """Wait. SIGTERM ends it, unless it is held back."""
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
