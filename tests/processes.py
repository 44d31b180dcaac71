"""Groups of real processes on this machine's CPU that train together, to be killed.

Both ends: `Group` is what a test holds, `join` what the program calls that it starts.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

TIMEOUT = 90  # s, for any one group of processes


class Group:
    """Processes of one training run, which share the devices; killed on the way out."""

    def __init__(self, program, directory, processes, *options, devices=4):
        self.log = directory.parent / f"{directory.name}.log"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flag = f"--xla_force_host_platform_device_count={devices // processes}"
        command = [sys.executable, program, directory, *options]
        with self.log.open("a") as log:
            self.members = [
                subprocess.Popen(
                    [*map(str, command), *_group_of(processes, index, port)],
                    env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for index in range(processes)
            ]
        self.said = [[] for _ in self.members]
        self.timer = threading.Timer(TIMEOUT, self.kill)

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *exception):
        self.timer.cancel()
        self.kill()
        for member in self.members:
            member.wait()
            member.stdout.close()

    def kill(self, *, only=None):
        self.send(signal.SIGKILL, only=only)

    def send(self, what, *, only=None):
        for index, member in enumerate(self.members):
            if only in (None, index):
                member.send_signal(what)

    def lines(self, index=0):
        """What a process says of its steps, as it comes."""
        for line in self.members[index].stdout:
            if line.startswith("{"):  # Gloo prints there too
                self.said[index].append(json.loads(line))
                yield self.said[index][-1]

    def wait_for(self, what, step, *, only=None):
        """Waits until all have said it."""
        for index in range(len(self.members)):
            if only in (None, index):
                said = (line.get(what) for line in self.lines(index))
                assert step in said, self.log.read_text()

    def finish(self):
        """All lines of each process, all of which must end well."""
        for index in range(len(self.members)):
            list(self.lines(index))
        codes = [member.wait() for member in self.members]
        assert codes == [0] * len(codes), self.log.read_text()
        return self.said


def _group_of(processes, index, port):
    return map(str, ("--processes", processes, "--index", index, "--port", port))


def join():
    """The arguments on the command line; if there are other processes, joins them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    if args.processes > 1:
        jax.distributed.initialize(
            f"localhost:{args.port}",
            args.processes,
            args.index,
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
        )
    return args


def digest(tree):
    """The sha256 over the bytes of all leaves; the same whatever their containers."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        leaf = np.asarray(leaf)
        sha.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()


def complete_steps(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def as_numpy(path):
    """Read by Orbax alone, whatever devices wrote it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        leaves = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            plain.metadata(path).item_metadata.tree,
        )
        return plain.restore(path, args=ocp.args.PyTreeRestore(restore_args=leaves))
