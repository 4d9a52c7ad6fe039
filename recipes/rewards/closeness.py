"""A reward in its own file: how close the last number of the answer is to the right one.

gspo train RECIPE reward.name=recipes/rewards/closeness.py:score
"""

import re


def score(problem, response):
    """1 for the right number, less the further away it is, 0 without a number."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", response.answer)
    if not numbers:
        return 0.0
    right, found = float(problem["answer"]), float(numbers[-1])
    return 1.0 / (1.0 + abs(right - found))
