"""The network interface through which the machines of a run reach each other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

INTERFACE = "GLOO_SOCKET_IFNAME"
PEER_KEY = "puma/peer"  # in the store: the address of a machine other than the main process's
SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def choose_interface(store: Store, rank: int, n_ranks: int) -> None:
    """Set GLOO_SOCKET_IFNAME in this process where gloo would listen to its own machine alone.

    gloo listens at the address of the machine's name. Debian's /etc/hosts may give the name of each machine as
    127.0.1.1, which no other machine reaches; NCCL looks at the interfaces instead. The interface is the one that leads
    to the main process's machine and, on that machine, to any other.

    Args:
        store: the store of all ranks.
        rank: of this process; the ranks of the main process's machine come first.
        n_ranks: the number of ranks.
    """
    n_local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not n_local.isdecimal() or int(n_local) >= n_ranks:
        return
    beside_main = rank < int(n_local)
    if not beside_main:
        store.set(PEER_KEY, _address_towards(os.environ["MASTER_ADDR"]))
    if INTERFACE in os.environ or _name_is_reachable():  # the others may need the address
        return
    peer = store.get(PEER_KEY).decode() if beside_main else os.environ["MASTER_ADDR"]
    interface = _interface_with(_address_towards(peer)) if peer else None
    if interface is not None:
        os.environ[INTERFACE] = interface


def _name_is_reachable() -> bool:
    """Whether gloo finds an address of this machine by its name which is not that of the loopback."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:  # no such name, or an address of another machine
        return False
    return not address.startswith("127.")


def _address_towards(peer: str) -> str:
    """The IPv4 address of this machine for packets to `peer`, of which none is sent; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _interface_with(address: str) -> str | None:
    """The name of the interface with an IPv4 address; None if no interface has it as its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
