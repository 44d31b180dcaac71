"""A worker's connection to the coordinator."""

import contextlib
import queue
import socket
import threading
import time

from emaopt.elastic._messages import (
    PROTOCOL,
    Address,
    Message,
    packed,
    parsed,
    tuned,
)


class Lost(ConnectionError):
    """The coordinator does not answer."""


class Link:
    """Sends messages, and puts those that come into `events`.

    When the connection ends, the last event is {"op": "lost", "error": why}.
    """

    def __init__(
        self,
        coordinator: Address,
        hello: Message,
        port: int,
        timeout: float,
        patience: float,
    ):
        """Connects.

        Args:
          coordinator: Where it listens.
          hello: What it is told first, but for the address.
          port: Where others pull this worker's parts.
          timeout: Seconds of silence after which the other side counts as dead.
          patience: Seconds to wait for a coordinator that does not listen yet.

        Raises:
          Lost: If none listens, or if it goes before it has answered.
          ValueError: If the coordinator refuses this worker.
        """
        self.events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.is_lost = False
        self._timeout = timeout
        self._socket = _connected(coordinator, timeout, patience)
        self._lines = self._socket.makefile("rb")
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        # Worker 0 is where all others find the coordinator.
        own = coordinator[0] if hello["worker"] == 0 else self._socket.getsockname()[0]
        self.send({"op": "hello", "protocol": PROTOCOL, **hello, "address": [own, port]})
        for target in (self._read, self._beat):
            threading.Thread(target=target, name="emaopt-link", daemon=True).start()
        first = self.next()
        if first["op"] == "refused":
            raise ValueError(first["error"])
        if first["op"] != "welcome":
            raise Lost(first["error"])
        self.group: str = first["group"]  # the coordinator's run
        self.number: int = first["number"]

    def send(self, message: Message) -> None:
        """Sends a message; if the connection has ended, `events` will tell."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(packed(message))

    def next(self) -> Message:
        """Waits for the next event."""
        while True:
            # With a timeout, so that Ctrl-C is noticed everywhere.
            with contextlib.suppress(queue.Empty):
                return self.events.get(timeout=1.0)

    def close(self) -> None:
        self.is_lost = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        error = "it has ended the connection"
        try:
            with self._lines:
                for line in self._lines:
                    self._heard = time.monotonic()
                    message = parsed(line)
                    if message["op"] != "beat":
                        self.events.put(message)
        except (OSError, ValueError) as problem:
            error = str(problem)
        self.close()
        self.events.put({"op": "lost", "error": error})

    def _beat(self) -> None:
        while time.monotonic() - self._heard < self._timeout:
            self.send({"op": "beat"})
            if self.is_lost:
                return
            time.sleep(self._timeout / 8)
        self.close()  # which ends `_read`


def _connected(address: Address, timeout: float, patience: float) -> socket.socket:
    until = time.monotonic() + patience
    while True:
        try:
            connection = tuned(socket.create_connection(address, timeout=timeout))
        except OSError as error:
            if time.monotonic() > until:
                raise Lost(str(error)) from error
            time.sleep(min(0.1, timeout / 10))
        else:
            connection.settimeout(None)
            return connection
