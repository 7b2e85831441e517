"""Machines whose name is that of the loopback, as Debian writes it, find the interface between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from torch.distributed import HashStore

from runtime import network

NODES = tuple(f"puma-{os.getpid()}-{name}" for name in "ab")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
PROGRAM = """
import os
from runtime.distributed import gather, start_world, stop_world
world = start_world("cpu")
print(gather(world.rank), os.environ.get("GLOO_SOCKET_IFNAME"))
stop_world()
"""


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[tuple[str, ...]]]:
    """The beginnings of commands that run on two machines: network namespaces with a cable between them."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("network namespaces need root, and the programs ip, unshare and mount")
    commands: list[tuple[str, ...]] = []
    with ExitStack() as stack:
        try:
            for node in NODES:
                ip("netns", "add", node)
                stack.callback(ip, "netns", "delete", node)
                ip("netns", "exec", node, "unshare", "--uts", "--mount", "true")
            cable = f"link add cable-a netns {NODES[0]} type veth peer name cable-b netns {NODES[1]}"
            ip(*cable.split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces, or no cable between them: {error.stderr}")
        for node, other, address, end in zip(NODES, NODES[::-1], ADDRESSES, ("cable-a", "cable-b"), strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", end)
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", end, "up")
            hosts = tmp_path / node
            far = ADDRESSES[NODES.index(other)]
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n{far} {other}\n")
            prepare = f'hostname {node} && mount --bind {hosts} /etc/hosts && exec "$@"'
            commands.append(("ip", "netns", "exec", node, "unshare", "--uts", "--mount", "sh", "-c", prepare, "sh"))
        yield commands


def test_machines_named_as_their_loopback_meet(machines):
    place = {"MASTER_ADDR": NODES[0], "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    ranks = ((machines[0], 0, 2), (machines[0], 1, 2), (machines[1], 0, 1))
    with ExitStack() as stack:
        processes = []
        for rank, (on_machine, local_rank, n_local) in enumerate(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(n_local)}
            process = subprocess.Popen(
                (*on_machine, sys.executable, "-c", PROGRAM),
                cwd=ROOT,
                env=os.environ | place | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            processes.append(process)
        written = [process.communicate(timeout=300) for process in processes]
    expected = [f"[0, 1, 2] {cable}\n" for cable in ("cable-a", "cable-a", "cable-b")]
    assert [out for out, _ in written] == expected, written


@pytest.fixture
def unreachable(monkeypatch):
    """One of two machines with one process each, whose own name is of no use."""
    monkeypatch.setattr(network, "_name_is_reachable", lambda: False)
    monkeypatch.delenv(network.INTERFACE, raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    os.environ.pop(network.INTERFACE, None)


def test_the_main_machine_looks_towards_an_address_that_another_has_told(unreachable):
    store = HashStore()
    network.choose_interface(store, 1, 2)
    assert os.environ.pop(network.INTERFACE) == "lo"
    assert store.get(network.PEER_KEY) == b"127.0.0.1"
    network.choose_interface(store, 0, 2)
    assert os.environ[network.INTERFACE] == "lo"


@pytest.mark.parametrize(
    ("name", "value"), [(network.INTERFACE, "ib0"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "")]
)
def test_a_choice_of_the_user_and_a_single_machine_are_left_alone(unreachable, name, value):
    unreachable.setenv(name, value)
    before = dict(os.environ)
    network.choose_interface(HashStore(), 1, 2)
    assert dict(os.environ) == before


def test_a_machine_with_a_good_name_only_tells_its_address(unreachable):
    unreachable.setattr(network, "_name_is_reachable", lambda: True)
    store = HashStore()
    network.choose_interface(store, 1, 2)
    assert store.get(network.PEER_KEY) == b"127.0.0.1"
    assert network.INTERFACE not in os.environ


def test_without_an_address_of_ipv4_nothing_is_chosen(unreachable):
    unreachable.setenv("MASTER_ADDR", "nowhere.invalid")
    store = HashStore()
    for rank in (1, 0):
        network.choose_interface(store, rank, 2)
        assert network.INTERFACE not in os.environ


def test_a_machine_whose_interface_is_given_tells_its_address(unreachable):
    unreachable.setenv(network.INTERFACE, "ib0")
    store = HashStore()
    network.choose_interface(store, 1, 2)
    assert store.get(network.PEER_KEY) == b"127.0.0.1"


@pytest.mark.parametrize(
    ("address", "reachable"), [("127.0.1.1", False), ("192.0.2.1", False), (None, False), ("0.0.0.0", True)]
)
def test_which_names_gloo_can_use(address, reachable, monkeypatch):
    def look_up(_: str) -> str:
        if address is None:
            raise OSError("no such name")
        return str(address)

    monkeypatch.setattr("socket.gethostbyname", look_up)
    assert network._name_is_reachable() == reachable
