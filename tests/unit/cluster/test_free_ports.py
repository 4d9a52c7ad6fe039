"""Ports of a run on one machine."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from gspo_megatron.cluster import free_ports as module
from gspo_megatron.cluster.free_ports import LOOPBACK, ephemeral_range, free_ports, hold_ports
from gspo_megatron.cluster.hosts import FIRST_PORT

IP_LOCAL_PORT_RANGE = 51


@pytest.fixture
def only_four(monkeypatch: pytest.MonkeyPatch) -> Iterator[range]:
    """Only four ports are there to choose from."""
    first = free_ports(1)[0]
    monkeypatch.setattr(module, "FIRST_PORT", first)
    monkeypatch.setattr(module, "LAST_PORT", first + 3)
    yield range(first, first + 4)


def test_no_outgoing_connection_can_take_a_port_of_a_role_before_its_restart() -> None:
    low, high = ephemeral_range()
    for _ in range(20):
        ports = free_ports(6)
        assert len(set(ports)) == 6
        assert not [port for port in ports if low <= port <= high]


def test_a_used_port_is_not_chosen(only_four: range) -> None:
    with socket.socket() as used:
        used.bind((LOOPBACK, only_four[1]))
        for _ in range(20):
            assert set(free_ports(2)) <= {only_four[0], *only_four[2:]}


def test_too_few_free_ports_are_one_sentence(only_four: range) -> None:
    with pytest.raises(OSError, match=r"^5 free ports are required between \d+ and \d+; [0-4] are free$"):
        free_ports(5)


def test_where_all_ports_are_given_to_connections_the_usual_ones_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tmp_path / "range"
    wide.write_text("1024\t65535\n")
    monkeypatch.setattr(module, "EPHEMERAL_FILE", wide)
    assert free_ports(1)[0] >= FIRST_PORT
    wide.write_text("nothing\n")
    assert ephemeral_range() == (32768, 60999)


def test_a_held_port_is_for_the_roles_only() -> None:
    port = free_ports(1)[0]
    with hold_ports(LOOPBACK, [port]):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((LOOPBACK, port))
        for _ in range(2):  # a role and the one that is started again
            with socket.create_server((LOOPBACK, port)) as role, socket.create_connection((LOOPBACK, port)):
                assert role.getsockname()[1] == port
        with hold_ports(LOOPBACK, [port]), socket.create_server((LOOPBACK, port)):
            pass  # a second run that wants to hold it does not fail there
        store = TCPStore(LOOPBACK, port, 1, is_master=True)
        store.set("key", "value")
        assert store.get("key") == b"value"
        del store


def test_the_kernel_gives_a_held_port_to_no_connection() -> None:
    """A connection whose range of ports is the held one finds none, although it is an ephemeral port."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    with socket.create_server((LOOPBACK, 0)) as listening, hold_ports(LOOPBACK, [port]), socket.socket() as caller:
        caller.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port | port << 16))
        with pytest.raises(OSError, match="assign requested address"):
            caller.connect(listening.getsockname())
