"""Which signals ask a trainer to stop, and that servers live through them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.places import ROOT

HOLD = "from gspo_megatron.cluster.stop_signals import hold_back; hold_back()"
TRAINER = """
import os, signal, subprocess, sys
{hold}
role = '''
import os, signal, sys
from gspo_megatron.cluster.stop_signals import StopSignals
stop = StopSignals()
print(stop.raised, flush=True)
os.kill(os.getpid(), int(sys.argv[1]))
print(stop.raised, flush=True)
'''
os.execv(sys.executable, [sys.executable, "-c", role, sys.argv[1]])
"""
SERVER = """
import os, signal, subprocess, sys
{hold}
engine = '''
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # as vLLM's engine does
print("ready", flush=True)
sys.stdin.read()
'''
child = subprocess.Popen([sys.executable, "-c", engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
child.terminate()
child.stdin.close()
print(child.wait())
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_trainer_that_was_started_by_slurm_takes_both(number: signal.Signals) -> None:
    done = run(TRAINER.format(hold=HOLD), str(int(number)))
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True"]), done


def test_on_one_machine_sigterm_ends_a_trainer() -> None:
    done = run(TRAINER.format(hold=""), str(int(signal.SIGTERM)))
    assert (done.returncode, done.stdout.split()) == (-signal.SIGTERM, ["False"]), done


def test_one_that_comes_before_the_trainer_can_act_on_it_is_kept() -> None:
    early = f"{HOLD}\nos.kill(os.getpid(), signal.SIGTERM)"
    assert run(TRAINER.format(hold=early), str(int(signal.SIGUSR1))).stdout.split() == ["True", "True"]


@pytest.mark.parametrize(("hold", "code"), [(HOLD, "0"), ("", "7")])
def test_a_server_and_its_engine_live_through_slurm_s_sigterm(hold: str, code: str) -> None:
    assert run(SERVER.format(hold=hold)).stdout.split() == [code]
