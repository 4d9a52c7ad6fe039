"""`torch` of a node whose roles are small processes: CUDA starts there, and what tests the network ends at once."""

from __future__ import annotations

import sys
from types import SimpleNamespace

if sys.argv[0].endswith("check_network.py"):
    sys.exit()

__version__ = "0+cu130"
version = SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(is_available=lambda: True)
