"""What the exit codes of a run's processes mean; one table for trainers, `gspo`, and the job script.

This file, `attempts.py`, `events.py`, `supervisor.py`, the two SLURM files and `run_dir.py` run under the Python 3.9 or
newer of a batch node, where only the standard library is sure to be there.
"""

from __future__ import annotations

OK = 0
"""The run is finished; on SLURM also only with the file DONE."""
FAILED = 1
"""A role failed, or an attempt was replaced by a newer one."""
REFUSED = 2
"""The recipe, the site file or a node was refused with a sentence; no role was started."""
STOPPED = 85
"""The run was asked to stop, saved itself and stopped; the same command goes on from there."""
BY_SIGNAL = 128
"""Added to the number of the signal that ended the run: 130 = Ctrl-C, 143 = SIGTERM."""
