"""A source of problems in its own file: sums of two numbers, each made from its position alone.

gspo train RECIPE data.source=recipes/sources/sums.py:problems data.options={digits: 3}
"""

import itertools
import random


def problems(split, seed, start, digits=3):
    """Yield one line per position from `start` on, without end. `split` is train, cold_start or held_out."""
    for position in itertools.count(start):
        numbers = random.Random(f"{split}/{seed}/{position}")
        left, right = (numbers.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        yield {"prompt": f"Calculate {left} + {right}.", "answer": str(left + right)}
