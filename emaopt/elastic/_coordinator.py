"""The service in worker 0's process: who is there, and what they are told."""

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable

from emaopt.elastic._group import Group, Outbox
from emaopt.elastic._messages import LONGEST, PROTOCOL, Message, packed, parsed

_logger = logging.getLogger("emaopt.elastic")


class Coordinator:
    """Listens to the workers, in a thread of its own; `Group` decides.

    A worker is gone if its connection ends, as the kernel ends it when the process dies,
    or if nothing comes from it for the heartbeat timeout.
    """

    def __init__(self, listener: socket.socket, num_workers: int, timeout: float):
        self._listener = listener
        self._num_workers = num_workers
        self._timeout = timeout
        self._ident = secrets.token_hex(8)  # of this run of the coordinator
        self._group = Group()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._heard: dict[int, float] = {}  # when a worker was last heard of
        self._changed = asyncio.Event()  # somebody came or went
        self._started = threading.Event()  # or failed to
        self._is_serving = False
        self._thread = threading.Thread(
            target=self._run, name="emaopt-coordinator", daemon=True
        )
        self._thread.start()
        self._started.wait()
        if not self._is_serving:
            raise OSError("elastic.connect: the coordinator could not start")

    def wait(self) -> None:
        """Returns when no other worker than 0 is connected."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._alone(), self._loop).result()

    def stop(self) -> None:
        """Ends the service, whoever is connected."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._loop, self._task = asyncio.get_running_loop(), task
        server = await asyncio.start_server(
            self._welcome, sock=self._listener, limit=LONGEST
        )
        self._is_serving = True
        self._started.set()
        try:
            await asyncio.gather(self._begin(), self._watch())
        finally:
            server.close()
            for writer in self._writers.values():
                writer.transport.abort()

    async def _alone(self) -> None:
        while self._writers.keys() - {0}:
            self._changed.clear()
            await self._changed.wait()

    async def _begin(self) -> None:
        """Lets the group begin when all are there, or after the heartbeat timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                while len(self._writers) < self._num_workers:
                    self._changed.clear()
                    await self._changed.wait()
        told = self._group.begin()
        for worker in self._writers:
            self._tell([(worker, self._greeting())])
        self._tell(told)

    async def _watch(self) -> None:
        """Leaves out the workers that nothing is heard of."""
        interval = self._timeout / 8
        while True:
            before = self._loop.time()
            await asyncio.sleep(interval)
            late = self._loop.time() - before - interval
            # What comes late here is no sign of the others: this process stood still.
            limit = self._timeout + (late if late > interval else 0)
            now = self._loop.time()
            for worker, heard in list(self._heard.items()):
                if now - heard > limit:
                    self._expel(
                        worker, f"nothing was heard of it for {now - heard:.1f} s"
                    )
                elif late > interval:
                    self._heard[worker] = now

    async def _welcome(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer):
            try:
                async with asyncio.timeout(self._timeout):
                    hello = parsed(await reader.readline())
                if hello.get("protocol") != PROTOCOL:
                    return
                if refusal := await self._refusal(hello, writer):
                    writer.write(packed({"op": "refused", "error": refusal}))
                    await writer.drain()
                else:
                    await self._listen(hello, reader, writer)
            except (OSError, ValueError, TypeError, KeyError, TimeoutError):
                pass  # a connection that broke, or of somebody who speaks otherwise
            except asyncio.CancelledError:
                pass  # the service ends; asyncio would log this as an error

    async def _listen(
        self, hello: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        worker: int = hello["worker"]
        self._writers[worker] = writer
        self._heard[worker] = self._loop.time()
        try:
            self._group.arrive(worker, tuple(hello["address"]), hello["number"])
            self._changed.set()
            _logger.info("worker %d is there", worker)
            if self._group.begun:
                writer.write(packed(self._greeting()))
            while line := await reader.readline():
                self._heard[worker] = self._loop.time()
                self._read(worker, writer, parsed(line))
        finally:
            if self._writers.get(worker) is writer:
                self._forget(worker)

    def _greeting(self) -> Message:
        return {"op": "welcome", "group": self._ident}

    def _read(self, worker: int, writer: asyncio.StreamWriter, message: Message) -> None:
        if self._writers.get(worker) is not writer:
            return  # it has been left out
        match message.pop("op"):
            case "beat":
                writer.write(packed({"op": "beat"}))
            case "offer":
                self._tell(self._group.offer(worker, message))
            case "done":
                self._tell(self._group.done(worker, message))
            case "unreachable":
                # One of two that do not reach each other has to go, for good: it would
                # hold up every exchange.
                one, other = sorted((worker, message["worker"]))
                if other in self._writers:
                    reason = f"workers {one} and {other} do not reach each other"
                    self._expel(other, reason, "refused")

    def _tell(self, outbox: Outbox) -> None:
        lines: dict[int, bytes] = {}  # by message, as many are told the same
        for worker, message in outbox:
            if writer := self._writers.get(worker):
                if id(message) not in lines:
                    lines[id(message)] = packed(message)
                writer.write(lines[id(message)])

    def _expel(self, worker: int, reason: str, op: str = "expelled") -> None:
        writer = self._writers[worker]
        _logger.warning("worker %d is left out: %s", worker, reason)
        writer.write(packed({"op": op, "error": reason}))
        writer.close()
        self._forget(worker)

    def _forget(self, worker: int) -> None:
        del self._writers[worker], self._heard[worker]
        _logger.info("worker %d is gone", worker)
        self._tell(self._group.leave(worker))
        self._changed.set()

    async def _refusal(self, hello: Message, writer: asyncio.StreamWriter) -> str | None:
        """Why a worker cannot come in, if it cannot."""
        worker = hello["worker"]
        own = {
            "num_workers": self._num_workers,
            "heartbeat_timeout_seconds": self._timeout,
        }
        for name, value in own.items():
            if hello[name] != value:
                return (
                    f"worker {worker} was started with {name}={hello[name]}, worker 0 "
                    f"with {value}"
                )
        host, port = hello["address"]
        try:
            await _within(self._timeout / 2, _reach(host, port))
        except (OSError, TimeoutError):
            return (
                f"worker {worker} offers its parts at {host}:{port}, where worker 0 does "
                "not reach it"
            )
        # A process that has just died may still count as alive; a worker that is started
        # again waits for that. This comes last: nothing is awaited before it is in.
        patience = self._loop.time() + 2 * self._timeout
        while worker in self._writers:
            if self._loop.time() > patience:
                return f"worker {worker} is there already; each process needs its own"
            writer.write(packed({"op": "beat"}))
            await asyncio.sleep(self._timeout / 20)
        return None


async def _reach(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()


async def _within(seconds: float, what: Awaitable[None]) -> None:
    async with asyncio.timeout(seconds):
        await what
