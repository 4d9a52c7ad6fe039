"""How many random cases a property test of rewards draws."""

import os

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10
