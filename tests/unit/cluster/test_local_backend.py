"""The supervisor of a run's processes, with small processes in place of the real roles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gspo_megatron.cluster.exit_codes import FAILED
from gspo_megatron.cluster.free_ports import LOOPBACK, free_ports
from gspo_megatron.cluster.local_backend import Role, plan_roles, run_roles
from gspo_megatron.models import load_recipe
from tests.checkpoints import write_checkpoint
from tests.places import ROOT
from tests.processes import runs
from tests.waiting import HANG, wait_until

SLEEP = (sys.executable, "-c", "import time; time.sleep(3600)")
"""Longer than any test may take: one that waits for its end hangs."""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def assert_ends(pid: int) -> None:
    """A process that was sent SIGKILL needs a moment on a busy machine."""
    wait_until(lambda: not runs(pid), f"end of process {pid}")


def test_ends_well_when_the_trainers_do(tmp_path: Path) -> None:
    roles = [Role("controller", SLEEP), Role("trainer-0", python("pass")), Role("trainer-1", python("pass"))]
    assert run_roles(roles, tmp_path) == 0


@pytest.mark.parametrize("victim", ["rollout-0", "controller", "trainer-1"])
def test_a_failing_role_ends_the_rest_and_is_named_last(
    tmp_path: Path, victim: str, capfd: pytest.CaptureFixture[str]
) -> None:
    roles = [
        Role(
            name,
            python("import sys; print('cannot listen: port in use', file=sys.stderr); sys.exit(3)")
            if name == victim
            else SLEEP,
        )
        for name in ("rollout-0", "controller", "trainer-0", "trainer-1")
    ]
    assert run_roles(roles, tmp_path) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert victim in last and "cannot listen: port in use" in last


def test_a_server_that_ends_by_itself_is_a_failure_even_with_code_0(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_roles([Role("rollout-0", python("pass")), Role("trainer-0", SLEEP)], tmp_path) == 1
    assert "rollout-0" in capfd.readouterr().err.strip().splitlines()[-1]


def test_trainers_that_were_asked_to_stop_have_not_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped = python("import sys; sys.exit(85)")
    assert run_roles([Role("rollout-0", SLEEP), Role("trainer-0", stopped), Role("trainer-1", stopped)], tmp_path) == 85
    assert "failed" not in capfd.readouterr().err


LISTENS = """
import signal, sys, time
open(sys.argv[1], "w").close()
while signal.SIGUSR1 not in signal.sigpending():  # it imports, and the request comes
    time.sleep(0.01)
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
while not asked:
    time.sleep(0.01)
sys.exit(85)
"""


def test_a_stop_that_is_asked_for_while_the_trainers_start_reaches_them(tmp_path: Path) -> None:
    born = [tmp_path / f"trainer-{rank}" for rank in range(2)]
    trainers = [Role(path.name, (sys.executable, "-c", LISTENS, str(path))) for path in born]
    parent = os.getpid()

    def ask() -> None:
        wait_until(lambda: all(path.exists() for path in born), "processes that start")
        os.kill(parent, signal.SIGUSR1)

    asking = threading.Thread(target=ask)
    asking.start()
    assert run_roles([Role("rollout-0", SLEEP), *trainers], tmp_path / "logs") == 85
    asking.join()


HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
{before}
server = http.server.HTTPServer(("127.0.0.1", {port}), Handler)
server.handle_request()
{after}
"""
"""A server that answers one health check."""


def healthy(port: int, before: str = "", after: str = "") -> tuple[str, ...]:
    """What such a server does before it listens and after its answer."""
    return python(HEALTHY.format(port=port, before=before, after=after))


def test_a_lost_server_is_started_again_while_another_serves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port, other = free_ports(2)
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')"
    dying = Role("rollout-1", healthy(port, count), restarts=2, ports=(port,))
    serving = Role("rollout-0", SLEEP, restarts=2, ports=(other,))
    assert run_roles([serving, dying, Role("trainer-0", SLEEP)], tmp_path / "logs") == 1
    assert (tmp_path / "starts").read_text() == "xxx"
    said = capfd.readouterr().err
    assert said.count("rollout-1 ended and is started again") == 2 and "rollout-1 failed" in said.splitlines()[-1]


def test_a_server_that_never_served_is_not_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It would end in the same way; the second start of one that has served counts for itself."""
    port, other = free_ports(2)
    starts = tmp_path / "starts"
    fails = f"import os\nopen({str(starts)!r}, 'a').write('x')\nif os.path.getsize({str(starts)!r}) > 1: sys.exit(3)"
    dying = Role("rollout-1", healthy(port, fails), restarts=2, ports=(port,))
    serving = Role("rollout-0", SLEEP, restarts=2, ports=(other,))
    assert run_roles([serving, dying, Role("trainer-0", SLEEP)], tmp_path / "logs") == 1
    assert starts.read_text() == "xx"
    assert capfd.readouterr().err.count("rollout-1 ended and is started again") == 1


def test_the_port_of_a_lost_server_is_free_again_for_it_alone(tmp_path: Path) -> None:
    """Another program asks for the port after the loss, and a child of the lost server still listens there."""
    port = free_ports(1)[0]
    other = f"""
import socket, time
try:
    taken = socket.socket(); taken.bind(("{LOOPBACK}", {port})); taken.listen()
except OSError:
    pass
open({str(tmp_path / "asked")!r}, "w").close()
time.sleep(3600)
"""
    lost = f"""
import os, signal, socket, sys, time
while not os.path.exists({str(tmp_path / "asked")!r}): time.sleep(0.02)
server = socket.create_server(("{LOOPBACK}", {port}))
if os.path.exists({str(tmp_path / "child")!r}):
    open({str(tmp_path / "back")!r}, "w").close()
elif not os.fork():
    open({str(tmp_path / "child")!r}, "w").close()
else:
    while not os.path.exists({str(tmp_path / "child")!r}): time.sleep(0.02)
    taken, _ = server.accept()
    taken.recv(4096), taken.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n"), taken.close()
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3600)
"""
    trainer = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'back')!r}): time.sleep(0.02)"
    server = Role("rollout-1", python(lost), restarts=1, ports=(port,))
    roles = [Role("rollout-0", python(other)), server, Role("trainer-0", python(trainer))]
    assert run_roles(roles, tmp_path / "logs") == 0, (tmp_path / "logs" / "rollout-1.log").read_text()


def test_the_killed_role_is_blamed_and_not_the_one_it_took_along(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dying = tmp_path / "dying"
    killed = python(f"import os, signal; open({str(dying)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)")
    code = f"import os, sys, time\nwhile not os.path.exists({str(dying)!r}): time.sleep(0.02)\nsys.exit(1)"
    dragged = python(code)
    assert run_roles([Role("trainer-0", dragged), Role("trainer-1", killed)], tmp_path) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "trainer-1" in last and "SIGKILL" in last


def test_children_of_roles_are_ended_too(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(3600)
"""
    wait = f"""
import os, time
while not (os.path.exists({str(child)!r}) and open({str(child)!r}).read()):
    time.sleep(0.05)
"""
    assert run_roles([Role("controller", python(code)), Role("trainer-0", python(wait))], tmp_path / "logs") == 0
    assert_ends(int(child.read_text()))


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_everything_with_a_sentence(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    code = f"import os, time; open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w'); time.sleep(3600)"
    script = f"""
import sys
from pathlib import Path
from gspo_megatron.cluster.local_backend import Role, run_roles
command = (sys.executable, "-c", {code!r})
roles = [Role("trainer-0", command), Role("controller", command)]
sys.exit(run_roles(roles, Path({str(tmp_path / "run" / "logs" / "attempt_1")!r}), resume="gspo train it"))
"""
    process = subprocess.Popen(python(script), stderr=subprocess.PIPE, text=True)

    def lives() -> None:
        assert process.poll() is None, process.communicate()[1]

    wait_until(lambda: len([entry for entry in tmp_path.iterdir() if entry.name.isdigit()]) == 2, "both roles", lives)
    process.send_signal(number)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == exit_code
    assert said.strip().splitlines()[-2:] == [
        f"gspo: ended by {number.name}",
        "gspo: no step is checkpointed, so it starts at the first; to go on: gspo train it",
    ]
    for entry in tmp_path.iterdir():
        if entry.name.isdigit():
            assert_ends(int(entry.name))


def test_every_end_says_what_to_type(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "step_000012")
    for code, said in ((0, "DONE; to train further: EXTEND"), (85, "step 12 is checkpointed; to go on: RESUME"),
                       (1, "step 12 is checkpointed; to go on: RESUME")):  # fmt: skip
        role = Role("trainer-0", python(f"import sys; print('reason'); sys.exit({code})"))
        assert run_roles([role], tmp_path / "logs" / f"attempt_{code}", resume="RESUME", extend="EXTEND") == code
        assert f"gspo: {said}" in capfd.readouterr().err


def test_the_key_is_in_no_command_line(tmp_path: Path) -> None:
    roles = plan_roles(load_recipe(Path("recipes/tiny_moe.yaml")), tmp_path, 2)
    assert [role.name for role in roles] == ["rollout-0", "controller", "trainer-0", "trainer-1"]
    (key,) = {role.environment["GSPO_JOB_KEY"] for role in roles}
    assert not any(key in argument for role in roles for argument in role.command)


def test_a_shell_that_ignores_the_ends_of_processes_hides_no_failure(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from gspo_megatron.cluster.local_backend import Role, run_roles\n"
        "sys.exit(run_roles([Role('trainer-0', ('false',))], Path(sys.argv[1]) / 'logs' / 'attempt_1'))\n"
    )
    words = ["bash", "-c", "trap '' CHLD; exec \"$@\"", "ignoring", sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == FAILED and "trainer-0 failed" in done.stderr, done
