"""Where things are: the checkout, and the data that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
"""What the launcher prints or starts for some recipes, as it is meant to be."""
