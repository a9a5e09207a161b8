"""Refuses every connection that leaves this machine. Python imports this file by itself when its folder is on
PYTHONPATH, so it holds in subprocesses and notebook kernels too; `tests/conftest.py` puts it there."""

import ipaddress
import socket
from typing import Any

_LOCAL_NAMES = {"", "localhost", "localhost.localdomain", "ip6-localhost"}


class NetworkSealedError(OSError):
    """A test tried to reach the network."""


def _is_local(host: Any) -> bool:
    if host is None:
        return True
    name = (host.decode() if isinstance(host, bytes) else str(host)).partition("%")[0].lower()
    if name in _LOCAL_NAMES or name == socket.gethostname().lower():
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: Any) -> None:
    if not _is_local(host):
        raise NetworkSealedError(f"the tests run without network, and something tried to reach {host!r}")


def _check(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        _refuse(address[0])


def seal() -> None:
    """Patch `socket` so that only this machine can be reached; calling it again changes nothing."""
    if getattr(socket, "sealed", False):
        return
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    look_up = socket.getaddrinfo

    def sealed_connect(self: socket.socket, address: Any) -> None:
        _check(self, address)
        return connect(self, address)

    def sealed_connect_ex(self: socket.socket, address: Any) -> int:
        _check(self, address)
        return connect_ex(self, address)

    def sealed_sendto(self: socket.socket, data: Any, *flags_and_address: Any) -> int:
        _check(self, flags_and_address[-1])
        return sendto(self, data, *flags_and_address)

    def sealed_getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        _refuse(host)
        return look_up(host, *rest, **options)

    socket.socket.connect = sealed_connect
    socket.socket.connect_ex = sealed_connect_ex
    socket.socket.sendto = sealed_sendto
    socket.getaddrinfo = sealed_getaddrinfo
    socket.sealed = True


seal()
