"""Ports for the roles of a run: chosen on one machine, and held while the roles run.

A role listens on one port for the whole run, and again after a restart. The kernel gives outgoing connections ports of
its ephemeral range, so a port from there can be taken between an end and the restart. Ports of a run lie below it. What
starts a role also holds its ports, so that no other program takes one in between where a site's range is wider.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gspo_megatron.cluster.hosts import FIRST_PORT, PORT_JOBS, PORT_STRIDE

LOOPBACK = "127.0.0.1"
LAST_PORT = FIRST_PORT + PORT_STRIDE * PORT_JOBS - 1
EPHEMERAL_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on, none of which the kernel gives to a connection.

    Raises:
        OSError: there are not as many.
    """
    chosen: list[socket.socket] = []
    try:
        for port in _candidates():
            if len(chosen) == count:
                break
            probe = socket.socket()
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                probe.close()
            else:
                chosen.append(probe)
        if len(chosen) < count:
            raise OSError(
                f"{count} free ports are required between {FIRST_PORT} and {LAST_PORT}; {len(chosen)} are free"
            )
        return [probe.getsockname()[1] for probe in chosen]
    finally:
        for probe in chosen:
            probe.close()


@contextmanager
def hold_ports(address: str, ports: Iterable[int]) -> Iterator[None]:
    """Keep ports of an address for the roles that are started meanwhile: a bound socket each, which never listens.

    The kernel gives a bound port to no connection, and refuses it to whoever does not share addresses (SO_REUSEADDR).
    vLLM, aiohttp and torch's store share them. A port that is taken already is left to its role, which refuses to
    start with a sentence.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ExitStack() as held:
        for port in ports:
            sock = held.enter_context(socket.socket(family))
            try:
                sock.bind((address, port))
            except OSError:
                sock.close()
            else:
                # After the bind, so that two runs cannot hold the same port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield


def _candidates() -> Iterator[int]:
    """Ports in an order of chance: two runs that start together choose different ones."""
    low, high = ephemeral_range()
    outside = [port for port in range(FIRST_PORT, LAST_PORT + 1) if not low <= port <= high]
    # Where the site gives all of them to connections there is no better choice.
    ports = outside or list(range(FIRST_PORT, LAST_PORT + 1))
    # Not the run's seeded generator: equal seeds would choose equal ports.
    return iter(random.SystemRandom().sample(ports, len(ports)))


def ephemeral_range() -> tuple[int, int]:
    """First and last port that the kernel gives to outgoing connections."""
    try:
        low, high = EPHEMERAL_FILE.read_text().split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(low), int(high)
