"""A real SLURM on this machine, for tests: slurmctld and slurmd from Debian, each node in namespaces of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv", "pgrep", "gcc")
CPUS = 192
GPUS = 8
PARTITION = "lab"
SPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=control(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire also decides how long a requeued job waits: one second more than it, and 5 is the least.
AuthInfo=socket={home}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
{types}MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_continue
# A node that is gone is found after about 25 s. Shorter limits take a node that is only busy for one that is gone.
SlurmdTimeout=5
MessageTimeout=10
TCPTimeout=2
# The daemons run before everything else on this machine (cluster.sh); what they start does not.
PropagatePrioProcess=1
KillWait=5
MinJobAge=600
JobRequeue={requeue}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Lets two real cores count as many.
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[11-{last}] CPUs={cpus} Boards=1 SocketsPerBoard=2 CoresPerSocket={cores} \
ThreadsPerCore=1 RealMemory=2000000 {gres}State=UNKNOWN
PartitionName={partition} Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
# Jobs of these two make room for those of `urgent`: after 60 s, or at once.
PartitionName=patient Nodes=ALL DefaultTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=spare Nodes=ALL DefaultTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL DefaultTime=60 State=UP PriorityTier=3 PreemptMode=OFF
"""


class LabError(RuntimeError):
    """The lab did not do what was asked; the message says what its daemons said."""


def missing() -> str | None:
    """Why no lab can be had here, in one sentence; None when it can."""
    if os.geteuid() != 0:
        return "the SLURM lab needs root for its network namespaces; run as root, or in a container where you are"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if not Path("/usr/include/slurm/spank.h").is_file():
        absent.append("slurm/spank.h")
    if absent:
        return (
            f"the SLURM lab misses {', '.join(absent)}; apt-get install slurmctld slurmd slurm-client munge iproute2 "
            "libslurm-dev procps gcc libc6-dev"
        )
    cable = "ip link add switch type bridge && ip link add cable type veth"
    tried = subprocess.run(("unshare", *SPACES, "sh", "-c", cable), capture_output=True, text=True)
    if tried.returncode:
        why = " ".join(tried.stderr.split())
        return f"the SLURM lab needs namespaces, bridges and veth pairs, which root cannot make here ({why})"
    return None


class Lab:
    """One cluster: a controller and nodes `node1`, `node2`, ... that share this machine's files."""

    def __init__(self, nodes: int = 6, shared: Sequence[Path] = (), gres: bool = True, requeue: bool = True) -> None:
        """
        Args:
            nodes: how many.
            shared: directories under /tmp that all nodes must see; the rest of /tmp is private to each node.
            gres: whether SLURM knows of GPUs.
            requeue: whether jobs may be queued again unless they say otherwise (JobRequeue).
        """
        self.nodes, self.gres, self.requeue = nodes, gres, requeue
        # Outside /tmp, which the nodes do not share.
        self.home = Path(tempfile.mkdtemp(prefix="slurm-lab-", dir="/var/tmp"))
        self.disk = self.home / "disk"
        """A file system of its own that all nodes see, of 96 MB: a test may fill it."""
        self.environment = {
            "LAB_DIR": str(self.home),
            "LAB_NODES": str(nodes),
            "LAB_SHARED": ":".join(str(path) for path in shared if str(path).startswith("/tmp/")),
            "SLURM_CONF": str(self.home / "etc" / "slurm.conf"),
        }
        self._outer: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self, timeout: float = 120) -> None:
        """Bring the cluster up; returns when all nodes are idle."""
        self._write_configuration()
        self.disk.mkdir()
        subprocess.run(("mount", "-t", "tmpfs", "-o", "size=96m", "disk", str(self.disk)), check=True)
        log = (self.home / "log" / "cluster.out").open("wb")
        # The lab dies with this process, however that one ends.
        self._outer = subprocess.Popen(
            ("setpriv", "--pdeathsig", "KILL", "unshare", *SPACES, str(HERE / "cluster.sh"), "init"),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self._init = int(wait_for(lambda: children.read_text().split()[:1], timeout, "process 1 of the lab")[0])
        try:
            wait_for(lambda: self.idle_nodes() == self.nodes, timeout, f"{self.nodes} idle nodes")
        except LabError as error:
            said = self.logs()
            self.stop()
            raise LabError(f"{error}\n{said}") from None

    def stop(self) -> None:
        """End everything by ending process 1 of the lab, and remove its directory."""
        if self._outer is not None:
            os.kill(self._init, signal.SIGKILL)
            self._outer.wait()
            self._outer = None
        subprocess.run(("umount", "--lazy", str(self.disk)), check=False, capture_output=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the cluster's login node, which is also its controller."""
        done = subprocess.run(
            (*enter(self._init), f"--wd={cwd or Path.cwd()}", "--", *command),
            env={**os.environ, **self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            raise LabError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def idle_nodes(self) -> int:
        """How many nodes wait for work."""
        said = self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).stdout.strip()
        return int(said) if said.isdigit() else 0

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """`sbatch` with these arguments; returns the job's id."""
        said = self.run("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd).stdout
        return int(said.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        ask = ("scontrol", "show", "job", "-o", str(job))
        # A busy controller has closed the connection at times (SIGPIPE).
        said = wait_for(lambda: self.run(*ask, check=False).stdout, 60, f"record of job {job}", pause=1.0)
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", said))

    def wait(self, job: int, timeout: float, states: Sequence[str] = ENDED) -> dict[str, str]:
        """Wait until a job is in one of the states; returns its description."""

        def reached() -> dict[str, str] | None:
            found = self.job(job)
            return found if found["JobState"] in states else None

        return wait_for(reached, timeout, f"job {job} in {'/'.join(states)}", pause=0.25)

    def on(self, node: str) -> tuple[str, ...]:
        """What to put before a command for `run`, to run it on a node beside whatever SLURM runs there."""
        return (*enter(self._node_init(node)), "--")

    def power_off(self, node: str) -> None:
        """Cut a node's power: everything on it is gone at once."""
        self.run("kill", "-KILL", str(self._node_init(node)))

    def power_on(self, node: str) -> None:
        """Switch a node on again."""
        self.run(str(HERE / "cluster.sh"), "boot", node.removeprefix("node"))

    @contextmanager
    def cut_off(self, node: str) -> Iterator[None]:
        """Pull a node's network cable; what runs there goes on, and it still sees the shared files."""
        cable = ("ip", "link", "set", f"cable{node.removeprefix('node')}")
        self.run(*cable, "down")
        try:
            yield
        finally:
            self.run(*cable, "up")

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stop slurmctld, and start it again with the state that it kept."""
        pid = (self.home / "run" / "slurmctld.pid").read_text().strip()
        self.run("kill", pid)
        try:
            wait_for(lambda: self.run("kill", "-0", pid, check=False).returncode, 60, "end of slurmctld")
            yield
        finally:
            self.run("nice", "-n", "-10", "slurmctld", "-i", "-f", self.environment["SLURM_CONF"])
            wait_for(lambda: not self.run("scontrol", "ping", check=False).returncode, 60, "slurmctld again")

    def _node_init(self, node: str) -> int:
        return int((self.home / "run" / f"init-{node.removeprefix('node')}").read_text())

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test."""
        texts = []
        for path in sorted((self.home / "log").iterdir()):
            # Debian's build looks for a PMIx that is not there, harmlessly, at every start.
            lines = [line for line in path.read_text(errors="replace").splitlines() if "pmi" not in line.lower()][-10:]
            texts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(texts)

    def _write_configuration(self) -> None:
        for name in ("etc", "run", "state", "spool", "log", "dev"):
            (self.home / name).mkdir(mode=0o755)
        self.home.chmod(0o755)
        etc = self.home / "etc"
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for index in range(GPUS):
            # slurmd wants character devices behind the names.
            (self.home / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        names = [f"10.77.0.{10 + node} node{node}" for node in range(1, self.nodes + 1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.1 control", *names]) + "\n")
        settings = {"home": self.home, "nodes": self.nodes, "last": 10 + self.nodes, "cpus": CPUS, "cores": CPUS // 2}
        settings |= (
            {"types": "GresTypes=gpu\n", "gres": f"Gres=gpu:h100:{GPUS} "} if self.gres else {"types": "", "gres": ""}
        )
        (etc / "slurm.conf").write_text(SLURM_CONF.format(**settings, requeue=int(self.requeue), partition=PARTITION))
        if self.gres:
            gres = f"NodeName=node[1-{self.nodes}] Name=gpu Type=h100 File={self.home}/dev/nvidia[0-{GPUS - 1}]\n"
            (etc / "gres.conf").write_text(gres)
        plugin = etc / "pyxis.so"
        subprocess.run(("gcc", "-O1", "-shared", "-fPIC", "-o", str(plugin), str(HERE / "pyxis.c")), check=True)
        (etc / "plugstack.conf").write_text(f"required {plugin}\n")
        slow = ("gcc", "-O1", "-shared", "-fPIC", "-o", str(self.slow_files), str(HERE / "slow_files.c"), "-ldl")
        subprocess.run(slow, check=True)

    @property
    def slow_files(self) -> Path:
        """A library that makes a directory slow and stale for the processes that load it (slow_files.c)."""
        return self.home / "etc" / "slow_files.so"


def enter(init: int) -> tuple[str, ...]:
    """The command that joins the namespaces of a process."""
    return ("nsenter", "-t", str(init), "-n", "-u", "-m", "-p")


def wait_for[T](ask: Callable[[], T | None], timeout: float, what: str, pause: float = 0.05) -> T:
    """Ask until the answer is true, every `pause` seconds. Raises LabError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise LabError(f"after {timeout:g} s there is no {what}")
        time.sleep(pause)
