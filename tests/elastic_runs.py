"""Elastic workers for tests: threads of one process, and processes to be killed."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import emaopt

LIMIT = 60  # s, for anything that is waited for
SECONDS = 4.0  # the heartbeat timeout


def free_address():
    while True:
        # Below the ports that systems give to connections, which would take it again.
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"127.0.0.1:{port}"


def together(body, num_workers, *, address=None, workers=None, seconds=SECONDS):
    """Runs body(workers) on each worker, in a thread of its own; returns the results.

    Once one has failed, the exchanges of the others fail, too: their loops wait for it.
    """
    address, failed = address or free_address(), threading.Event()
    chosen = list(range(num_workers) if workers is None else workers)
    results, errors = {}, []

    def run(worker):
        try:
            with emaopt.elastic.connect(
                address,
                num_workers=num_workers,
                worker=worker,
                heartbeat_timeout_seconds=seconds,
            ) as connected:
                whole = connected.exchange

                def exchange(*args, **options):
                    assert not failed.is_set(), "another worker has failed"
                    return whole(*args, **options)

                connected.exchange = exchange
                results[worker] = body(connected)
        except BaseException as error:
            errors.append(error)
            failed.set()

    # Daemons, which a process does not wait for at its end.
    threads = [threading.Thread(target=run, args=(w,), daemon=True) for w in chosen]
    for thread in threads:
        thread.start()
    until = time.monotonic() + LIMIT
    while any(thread.is_alive() for thread in threads) and not failed.is_set():
        if time.monotonic() > until:
            failed.set()
            raise TimeoutError(f"workers {chosen} are not done after {LIMIT} s")
        time.sleep(0.002)
    for thread in threads:
        thread.join(LIMIT / 2)
    if errors:
        raise errors[0]
    return [results[worker] for worker in chosen]


class Processes:
    """Workers of tests/elastic_worker.py, by number, and all that they say."""

    def __init__(self, num_workers, *options, log):
        self.address, self.log = free_address(), Path(log)
        self.command = [
            sys.executable,
            str(Path(__file__).with_name("elastic_worker.py")),
        ]
        self.options = [f"--num-workers={num_workers}", *options]
        self.said = []  # (worker, what), in the order in which it came
        self.members, self.threads = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for worker in self.members:
            self.send(signal.SIGCONT, worker)
            self.send(signal.SIGKILL, worker)
        for member in self.members.values():
            member.wait()
        for thread in self.threads:
            thread.join()

    def start(self, *workers, options=()):
        for worker in workers:
            with self.log.open("a") as log:
                member = subprocess.Popen(
                    [*self.command, self.address, str(worker), *self.options, *options],
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self.members[worker] = member
            thread = threading.Thread(target=self._listen, args=(worker, member))
            thread.start()
            self.threads.append(thread)

    def send(self, what, *workers):
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                self.members[worker].send_signal(what)

    def kill(self, *workers):
        self.send(signal.SIGKILL, *workers)
        for worker in workers:
            self.members[worker].wait()

    def wait_for(self, holds, seconds=LIMIT):
        """Waits until `holds` of what has been said."""
        until = time.monotonic() + seconds
        while not holds(list(self.said)):
            assert time.monotonic() < until, (self.said[-5:], self.log.read_text())
            time.sleep(0.01)

    def ended(self, *workers):
        """Waits until these processes have ended; returns their exit statuses."""
        return [self.members[worker].wait(LIMIT) for worker in workers]

    def _listen(self, worker, member):
        with member.stdout:
            for line in member.stdout:
                self.said.append((worker, json.loads(line)))
