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
    limit,
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

    def __init__(self, coordinator: Address, hello: Message, port: int, timeout: float):
        """Connects.

        Args:
          coordinator: Where it listens.
          hello: What it is told first, but for the address.
          port: Where others pull this worker's parts.
          timeout: Seconds of silence after which the other side counts as dead.

        Raises:
          Lost: If none listens, or if it goes before it has answered.
          ValueError: If the coordinator refuses this worker.
        """
        self.events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.is_lost = False
        self._timeout = timeout
        try:
            connection = socket.create_connection(coordinator, timeout=timeout)
        except OSError as error:
            raise Lost(str(error)) from error
        self._socket = tuned(connection)
        limit(self._socket, socket.SO_SNDTIMEO, timeout)
        self._lines = self._socket.makefile("rb")
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        try:
            self._greet(coordinator, hello, port)
        except BaseException:
            self.close()
            raise

    def _greet(self, coordinator: Address, hello: Message, port: int) -> None:
        # Worker 0 is where all others find the coordinator.
        own = coordinator[0] if hello["worker"] == 0 else self._socket.getsockname()[0]
        self.send({"op": "hello", "protocol": PROTOCOL, **hello, "address": [own, port]})
        for target in (self._read, self._beat):
            threading.Thread(target=target, name="emaopt-link", daemon=True).start()
        first = self.next()
        if first["op"] == "refused":
            raise ValueError(first["error"])
        if first["op"] != "welcome":
            raise Lost(first.get("error", "it does not answer as worker 0 does"))
        self.group: str = first["group"]  # the coordinator's run

    def send(self, message: Message) -> None:
        """Sends a message; if the connection has ended, `events` will tell."""
        with self._sending:
            self._send(message)

    def _send(self, message: Message) -> None:
        try:
            self._socket.sendall(packed(message))
        except OSError:
            self.close()  # the other side may have got a part of it

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
        while time.monotonic() - self._heard < self._timeout and not self.is_lost:
            # A long message is a sign of life, too.
            if self._sending.acquire(timeout=self._timeout / 8):
                try:
                    self._send({"op": "beat"})
                finally:
                    self._sending.release()
            time.sleep(self._timeout / 8)
        self.close()  # which ends `_read`
