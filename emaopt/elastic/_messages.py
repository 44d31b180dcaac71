"""Messages between the workers and the coordinator: one JSON object on each line."""

import json
import socket
import struct
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Address: TypeAlias = tuple[str, int]

PROTOCOL = "emaopt elastic 1"
LONGEST = 1 << 26  # bytes of a line, which may hold the names of all leaves


def packed(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parsed(line: bytes) -> Message:
    """The message of a line; ValueError if it holds none."""
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError(f"not a message: {line[:80]!r}")
    return message


def parsed_address(function: str, address: object) -> Address:
    """(host, port) of "host:port" or "[IPv6]:port"; raises if it is neither."""
    host, colon, port = address.rpartition(":") if isinstance(address, str) else ("",) * 3
    host = host.removeprefix("[").removesuffix("]") if host[:1] == "[" else host
    if not (colon and host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(
            f"{function}: coordinator_address must be 'host:port', where worker 0 can be "
            f"reached by all, such as '10.0.0.1:8476', got {address!r}."
        )
    return host, int(port)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens where others find `host`.

    On this machine alone if the host is written as its own address; else on all
    interfaces, since a name may be that of a load balancer in front of it.
    """
    if host in ("localhost", "::1") or host.startswith("127."):
        (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((host, port), family=family, backlog=256)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(
        ("", port), family=family, backlog=256, dualstack_ipv6=both
    )


def tuned(connection: socket.socket) -> socket.socket:
    """The connection, sending small messages at once and noticing dead machines."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def limit(connection: socket.socket, what: int, timeout: float) -> None:
    """Lets sending or receiving fail if nothing moves for so many seconds."""
    # Python's own timeout would wake the thread for every few bytes that come.
    connection.settimeout(None)
    seconds, parts = divmod(timeout, 1)
    packed = struct.pack("ll", int(seconds), int(parts * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, what, packed)
