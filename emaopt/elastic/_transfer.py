"""Parts of arrays from one worker to another."""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from emaopt.elastic._layout import Row
from emaopt.elastic._messages import Address, limit, listening, tuned

_logger = logging.getLogger("emaopt.elastic")

COMMIT, SCALES, SUM, CENTER, REPAIR = range(5)  # what can be pulled
CHUNK = 1 << 22  # bytes that are added up, or sent, at a time

_REQUEST = struct.Struct("!8sQBQQ")  # group, attempt, what, first and last byte
_FRAME = struct.Struct("!q")  # bytes that follow
_WAIT, _GONE = 0, -1  # in their place: not there yet; there will be none


class Gone(ConnectionError):
    """What was to be pulled is not offered any more."""


class Source:
    """A row that others pull, as far as it is ready."""

    def __init__(self, row: Row, ready: int):
        self.row = row
        self.ready = ready  # bytes, from the first on, that may be read


def whole(row: Row) -> Source:
    """A row that is ready."""
    return Source(row, row.byte(row.size))


class Offers(NamedTuple):
    attempt: int
    sources: dict[int, Source]  # by what they are


class Server:
    """Lets the other workers pull what this one offers."""

    def __init__(self, host: str, timeout: float):
        self.changed = threading.Condition()  # also for what `Source.ready` says
        self.is_open = True
        self.group = ""  # the coordinator's run, once it is known
        self._offers = Offers(0, {})
        self._timeout = timeout
        self._listener = listening(host, 0)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="emaopt-server", daemon=True).start()

    def offer(self, attempt: int, sources: dict[int, Source]) -> None:
        """Offers these and nothing else."""
        with self.changed:
            self._offers = Offers(attempt, sources)
            self.changed.notify_all()

    def add(self, attempt: int, what: int, source: Source) -> None:
        """Offers this as well, if the attempt is still the last one."""
        with self.changed:
            if self._offers.attempt == attempt and self._offers.sources:
                self._offers.sources[what] = source
                self.changed.notify_all()

    def withdraw(self) -> None:
        """Offers nothing."""
        with self.changed:
            self._offers = self._offers._replace(sources={})
            self.changed.notify_all()

    def close(self) -> None:
        self.is_open = False
        self.withdraw()
        with contextlib.suppress(OSError):  # wakes the thread in `accept`
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,))
                thread.name, thread.daemon = "emaopt-serve", True
                thread.start()
            except (OSError, RuntimeError) as error:  # too many files or threads, say
                if not self.is_open:
                    return
                _logger.warning("a worker could not be served: %s", error)
                time.sleep(self._timeout / 20)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), tuned(connection):
            limit(connection, socket.SO_SNDTIMEO, self._timeout)
            while request := _received(connection, _REQUEST.size):
                group, attempt, what, start, stop = _REQUEST.unpack(request)
                if group.hex() != self.group:
                    return  # of another run
                self._send(connection, attempt, what, start, stop)

    def _send(
        self, connection: socket.socket, attempt: int, what: int, start: int, stop: int
    ) -> None:
        def moves() -> bool:
            row, ready = self._found(attempt, what)
            return ready == _GONE or (row is not None and ready > start)

        while start < stop:
            with self.changed:
                self.changed.wait_for(moves, timeout=self._timeout / 8)
                row, ready = self._found(attempt, what)
            if ready == _GONE:
                connection.sendall(_FRAME.pack(_GONE))
                return
            if row is None or ready <= start:
                connection.sendall(_FRAME.pack(_WAIT))  # this side lives
                continue
            ready = min(ready, stop, start + CHUNK)
            connection.sendall(_FRAME.pack(ready - start))
            for piece in row.memory(start, ready):
                connection.sendall(piece)
            start = ready

    def _found(self, attempt: int, what: int) -> tuple[Row | None, int]:
        """(what was asked for, up to which byte it is ready)."""
        now, sources = self._offers
        if now > attempt or (now == attempt and not sources):
            return None, _GONE
        source = sources.get(what) if now == attempt else None
        return (None, 0) if source is None else (source.row, source.ready)


class Peer:
    """A connection to another worker's server."""

    def __init__(self, address: Address, group: str, timeout: float):
        self._group = bytes.fromhex(group)
        self.num_bytes = 0  # that have come, but for the frames
        self._socket = tuned(socket.create_connection(address, timeout=timeout))
        limit(self._socket, socket.SO_RCVTIMEO, timeout)

    def pull(
        self,
        attempt: int,
        what: int,
        row: Row,
        start: int,
        stop: int,
        offset: int = 0,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Writes bytes of what the other side offers to a row.

        Args:
          attempt, what: Name the offer.
          row: Where to write.
          start, stop: The bytes of the offer.
          offset: The byte of the offer that is the first of the row.
          progress: Is told up to which byte the row is written.

        Raises:
          Gone: If it is not offered any more.
          OSError: If the connection ends, or nothing comes for too long.
        """
        if start == stop:
            return
        self._socket.sendall(_REQUEST.pack(self._group, attempt, what, start, stop))
        while start < stop:
            frame = _received(self._socket, _FRAME.size)
            if not frame:
                raise ConnectionResetError("the other side has ended the connection")
            (length,) = _FRAME.unpack(frame)
            if length == _GONE:
                raise Gone("it is not offered any more")
            for piece in row.memory(start - offset, start - offset + length):
                _receive_into(self._socket, piece)
            if length:
                self.num_bytes += length
                start += length
                progress(start - offset)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # wakes a thread that waits for bytes
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _received(connection: socket.socket, size: int) -> bytes:
    """As many bytes; none if the connection has ended before the first."""
    buffer = bytearray(size)
    first = connection.recv_into(buffer)
    if first:
        _receive_into(connection, memoryview(buffer)[first:])
    return bytes(buffer) if first else b""


def _receive_into(connection: socket.socket, memory: memoryview) -> None:
    while memory:
        count = connection.recv_into(memory, 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionResetError("the other side has ended the connection")
        memory = memory[count:]
