"""Random damage to the files of checkpoints; see `faults.py`."""

import multiprocessing
import os
import pickle
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import optax
import orbax.checkpoint as ocp
from absl import logging
from fault_states import TIMEOUT, Trial, bits, state_of

import emaopt
from emaopt import checkpoint

MEMORY = 4 << 30  # bytes of a process's own data
LOCAL = emaopt.local_sgd(optax.sgd(0.1), num_workers=2, period=2)


def local_state(number: int) -> dict[str, Any]:
    params = emaopt.stack_workers(state_of(number)["params"], 2)
    return {"params": params, "opt_state": LOCAL.init(params)}


def save_alone(path: Path) -> None:
    checkpoint.save(path, state_of(0))


def save_managed(path: Path) -> None:
    with ocp.CheckpointManager(
        path.parent / "run", handler_registry=checkpoint.handler_registry()
    ) as manager:
        manager.save(1, args=ocp.args.StandardSave(state_of(0)))
    shutil.copytree(path.parent / "run" / "1", path)


def save_items(path: Path) -> None:
    state = state_of(0)
    args = {
        "params": ocp.args.StandardSave(state.pop("params")),
        "train_state": ocp.args.PyTreeSave(state),
    }
    with ocp.CheckpointManager(
        path.parent / "items", handler_registry=checkpoint.handler_registry()
    ) as manager:
        manager.save(1, args=ocp.args.Composite(**args))
    shutil.copytree(path.parent / "items" / "1", path)


def save_center(path: Path) -> None:
    checkpoint.save(path, local_state(0))


def statistics_state(number: int) -> dict[str, Any]:
    """A state with a tree beside the parameters, as BatchNorm's statistics."""
    other = state_of(number + 1)["params"]
    return state_of(number) | {
        "batch_stats": {"mean": other["dense"], "none": other["empty"]}
    }


def save_served(path: Path) -> None:
    served = statistics_state(7)["batch_stats"]
    checkpoint.save(path, statistics_state(0), served={"batch_stats": served})


def save_combined(path: Path) -> None:
    checkpoint.save(path.parent / "source", state_of(0))
    checkpoint.combine([path.parent / "source"], [1.0], path)


def items_of(state: dict[str, Any]) -> dict[str, Any]:
    rest = {name: tree for name, tree in state.items() if name != "params"}
    return {"params": state["params"], "train_state": rest}


KINDS: dict[str, tuple[Callable[[Path], None], Any]] = {  # and what restore is given
    "save": (save_alone, lambda: state_of(0)),
    "manager": (save_managed, lambda: state_of(0)),
    "items": (save_items, lambda: items_of(state_of(0))),
    "center": (save_center, lambda: local_state(0)),
    "served": (save_served, lambda: statistics_state(0)),
    "combination": (save_combined, None),
}
READERS: dict[str, Callable[[Path, Any], Any]] = {
    "restore": lambda path, target: bits(checkpoint.restore(path, target)),
    "load_averaged": lambda path, target: bits(checkpoint.load_averaged(path)),
    "export_safetensors": lambda path, target: exported(path),
    "combine": lambda path, target: combined(path),
    "describe": lambda path, target: described(path),
}


def exported(path: Path) -> bytes:
    out = path.parent / "out.safetensors"
    checkpoint.export_safetensors(path, out)
    return out.read_bytes()


def combined(path: Path) -> Any:
    out = path.parent / "combined"
    checkpoint.combine([path], [1.0], out)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return bits(checkpointer.restore(out))


def described(path: Path) -> str:
    return repr(checkpoint.describe(path)._replace(nbytes_on_disk=0))


def damage(path: Path, rng: random.Random) -> str:
    """Damages one file, and says what it did."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = rng.choice(files)
    content, name = bytearray(file.read_bytes()), file.relative_to(path)
    how = rng.choice(
        ["bit"] * 4 + ["zeros", "bytes", "cut", "emptied", "removed", "exchanged"]
    )
    if how == "removed":
        file.unlink()
        return f"{name} removed"
    if how == "exchanged":
        other = rng.choice(files)
        theirs = other.read_bytes()
        other.write_bytes(content)
        file.write_bytes(theirs)
        return f"{name} exchanged with {other.relative_to(path)}"
    begin = rng.randrange(max(len(content), 1))
    end = min(len(content), begin + rng.choice([1, 8, 512]))
    if how == "bit" and content:
        content[begin] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[begin:end] = bytes(end - begin)
    elif how == "bytes":
        content[begin:end] = rng.randbytes(end - begin)
    elif how == "cut":
        del content[begin:]
    elif how == "emptied":
        content.clear()
    file.write_bytes(content)
    return f"{how} in {name} at {begin}"


def prepare(directory: Path) -> None:
    """Writes the checkpoints, and what the readers say of them."""
    truth = {}
    for kind, (save, target) in KINDS.items():
        path = directory / kind / "c"
        path.parent.mkdir()
        save(path)
        for reader in READERS:
            # Without its record, a combination is an ordinary checkpoint of parameters.
            if target is not None or reader not in ("restore", "describe"):
                truth[kind, reader] = read_of(directory, kind, reader, lambda path: None)
    (directory / "truth").write_bytes(pickle.dumps(truth))


def read_of(
    directory: Path, kind: str, reader: str, change: Callable[[Path], Any]
) -> Any:
    """What a reader makes of a copy that was changed, always at one place."""
    target = KINDS[kind][1]
    place = Path(tempfile.gettempdir()) / f"emaopt-faults-{os.getpid()}"
    try:
        shutil.copytree(directory / kind / "c", place / "c")
        change(place / "c")
        found = READERS[reader](place / "c", target() if target else None)
        return found if not isinstance(found, str) else found.replace(str(place), "")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def damaged(directory: Path, seed: int) -> Trial:
    """One trial, in a process of its own."""
    rng = random.Random(seed)
    truth = pickle.loads((directory / "truth").read_bytes())
    kind, reader = rng.choice(sorted(truth))
    done = []
    try:
        found = read_of(
            directory, kind, reader, lambda path: done.append(damage(path, rng))
        )
    except Exception as error:
        return _judged(error, reader), f"{kind}, {reader}: {done}: {error!r}"
    same = found == truth[kind, reader]
    return ("right" if same else "wrong numbers"), f"{kind}, {reader}: {done}"


def _judged(error: Exception, function: str) -> str:
    clear = isinstance(error, (ValueError, FileNotFoundError))
    if clear and str(error).startswith(f"{function}: ") and "emaopt-faults" in str(error):
        return "clear error"
    return "unclear error"


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    logging.set_verbosity(logging.FATAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def damage_trials(directory: Path, seed: int, until: float) -> Iterator[Trial]:
    """Trials one after another, until a time of day."""
    prepare(directory)
    context = multiprocessing.get_context("spawn")
    pool = None
    while time.time() < until:
        if pool is None:
            pool = ProcessPoolExecutor(1, context, _limited)
        try:
            what, details = pool.submit(damaged, directory, seed).result(TIMEOUT)
        except (TooLong, BrokenProcessPool) as error:
            what, details = type(error).__name__, ""
            for process in list(pool._processes.values()):
                process.kill()
            pool = None
        yield what, f"seed {seed}: {details}"
        seed += 1
    if pool is not None:
        pool.shutdown()
