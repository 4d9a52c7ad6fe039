"""A server or a controller of a test: it lives until somebody ends it. As `torch` it ends what tests the network."""

from __future__ import annotations

import signal
import sys

if sys.argv[0].endswith("check_network.py"):
    sys.exit()


def main() -> None:
    """Wait. SIGTERM ends it, unless it is held back."""
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
