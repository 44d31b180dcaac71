"""No kill, and no run that starts over after it, takes the only complete checkpoint."""

import contextlib
import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _replacement

TX = emaopt.averaged(optax.sgd(1.0), 0.5)


def state_of(value):
    params = {"w": jnp.full(1, float(value))}
    return {"params": params, "opt_state": TX.init(params)}


def value(path):
    return float(checkpoint.restore(path, state_of(0))["params"]["w"][0])


def values_in(directory):
    return sorted(value(path) for path in directory.iterdir())


@pytest.fixture(autouse=True)
def another_process():
    """Each test starts as a run does, which has restored nothing."""
    _replacement._taken_up.clear()


# What a kill leaves beside the path: {suffix: value}, and what is then found at it.
LEFT = {
    "between the renames": ({".replaced": 500, ".replacement": 501}, 501),
    "after the first, of an older save": ({".replaced": 500}, 500),
    "before the first": ({"": 500, ".replacement": 501}, 500),
    "after the second": ({"": 501, ".replaced": 500}, 501),
}


@pytest.fixture(params=LEFT)
def killed(request, tmp_path):
    left, found = LEFT[request.param]
    for suffix, number in left.items():
        checkpoint.save(tmp_path / f"c{suffix}", state_of(number))
    _replacement._taken_up.clear()
    return tmp_path / "c", found


def test_readers_find_what_a_kill_left(killed, caplog):
    path, found = killed
    assert value(path) == found
    assert float(checkpoint.load_averaged(path)["w"][0]) == found
    assert checkpoint.describe(path).served == "the averages of opt_state/averaging"
    assert ("cut short" in caplog.text) == (not path.exists())


def test_a_run_that_goes_on_leaves_its_checkpoint_alone(killed):
    path, found = killed
    restored = checkpoint.restore(path, state_of(0))
    checkpoint.save(path, restored, force=True)
    assert [p.name for p in path.parent.iterdir()] == ["c"]
    assert value(path) == found


def test_a_run_that_starts_over_keeps_what_it_has_not_seen(killed, caplog):
    path, found = killed
    seen = path.exists()
    checkpoint.save(path, state_of(0), force=True)
    checkpoint.save(path, state_of(1), force=True)
    assert values_in(path.parent) == ([1] if seen else [1, found])
    assert ("is kept as" in caplog.text) == (not seen)


def test_an_average_keeps_what_it_has_not_seen(tmp_path):
    checkpoint.save(tmp_path / "1", state_of(1))
    checkpoint.save(tmp_path / "c.replacement", state_of(501))
    checkpoint.average([tmp_path / "1"], tmp_path / "c", force=True)
    assert value(tmp_path / "c.kept1") == 501


def test_what_is_not_finished_beside_the_path_is_not_read(tmp_path):
    (tmp_path / "c.replacement").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load_averaged(tmp_path / "c")
    checkpoint.save(tmp_path / "c.replaced", state_of(500))
    assert value(tmp_path / "c") == 500


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_of_a_link_its_target_is_replaced(dangling, force, tmp_path):
    if not dangling:
        checkpoint.save(tmp_path / "disk", state_of(1))
    (tmp_path / "latest").symlink_to(tmp_path / "disk")
    if not dangling and not force:
        with pytest.raises(ValueError, match="already exists"):
            checkpoint.save(tmp_path / "latest", state_of(2))
        return
    checkpoint.save(tmp_path / "latest", state_of(2), force=force)
    assert (tmp_path / "latest").is_symlink() and value(tmp_path / "disk") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "latest"}


def test_an_average_over_a_link_replaces_its_target(tmp_path):
    checkpoint.save(tmp_path / "1", state_of(3))
    checkpoint.save(tmp_path / "disk", state_of(1))
    (tmp_path / "latest").symlink_to(tmp_path / "disk")
    checkpoint.average([tmp_path / "1"], tmp_path / "latest", force=True)
    assert (tmp_path / "latest").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"1", "disk", "latest"}


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_of_the_first_process_is_one_of_all(process, tmp_path, monkeypatch):
    told = []

    def broadcast(said):
        told.append(said)
        return told[0]

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    for number in range(process + 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(OSError, match="was not completed"):
            path = checkpoint._files.absolute(tmp_path / "c")
            _replacement._take_place("save", path, path.parent / "none", True)
    assert len(told) == process + 1


SAVES_OVER = """
import sys
import jax, jax.numpy as jnp, optax
import emaopt
from emaopt import checkpoint

path, number = sys.argv[1], int(sys.argv[2])
tx = emaopt.averaged(optax.adam(1e-2), 0.9)
params = {f"w{i}": jnp.zeros((64, 64)) for i in range(8)}
state = {"params": params, "opt_state": tx.init(params)}
for i in range(number, 60 + number, 2):
    checkpoint.save(path, jax.tree.map(lambda x: jnp.full_like(x, i), state), force=True)
"""


@pytest.mark.slow
def test_of_two_writers_to_one_path_each_is_whole_and_the_last_stays(tmp_path):
    command = [sys.executable, "-c", SAVES_OVER, tmp_path / "c"]
    writers = [subprocess.Popen([*command, str(number)]) for number in (0, 1)]
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError, _replacement.Replaced):
            loaded = checkpoint.load_averaged(tmp_path / "c")
            assert len({float(x) for leaf in loaded.values() for x in leaf.ravel()}) == 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert float(checkpoint.load_averaged(tmp_path / "c")["w0"][0, 0]) in (58.0, 59.0)
    assert os.listdir(tmp_path) == ["c"]


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    own, other = ("." + _replacement._mark(tmp_path / name) for name in ("c", "other"))
    dead, living, others = (
        f"{own}0.unfinished",
        f"{own}1.unfinished",
        f"{other}0.unfinished",
    )
    notes = f"{own}notes"
    for name in (dead, living, others, notes):
        (tmp_path / name / "part").mkdir(parents=True)
    with _replacement._locked(tmp_path / living):
        checkpoint.save(tmp_path / "c", state_of(1), force=True)
    assert set(os.listdir(tmp_path)) == {living, others, notes, "c"}


def test_a_lock_that_somebody_keeps_is_not_waited_for_for_ever(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(_replacement, "_PATIENCE", 0.1)
    with _replacement._locked(tmp_path):
        checkpoint.save(tmp_path / "c", state_of(1), force=True)
    assert value(tmp_path / "c") == 1 and "not waited for any longer" in caplog.text


def test_on_a_url_what_a_killed_save_left_is_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(_replacement, "is_url", lambda path: True)
    checkpoint.save(tmp_path / "c", state_of(1), force=True)
    (tmp_path / "c.replacement" / "part").mkdir(parents=True)
    checkpoint.save(tmp_path / "c", state_of(2), force=True)
    assert value(tmp_path / "c") == 2 and os.listdir(tmp_path) == ["c"]


def test_a_writer_holds_what_it_writes_in_and_leaves_nothing_if_it_fails(tmp_path):
    path = checkpoint._files.absolute(tmp_path / "c")
    with pytest.raises(RuntimeError, match="stop"):
        with _replacement.taking_place("save", path, force=True, report=print) as written:
            written.mkdir()
            _replacement._remove_dead(path)  # as every writer does
            assert written.exists()
            raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_an_error_of_the_system_names_the_path_and_not_where_it_was_written(
    kind, force, tmp_path, monkeypatch
):
    def fails(self, where, *args, **options):
        if kind is ValueError:  # of TensorStore's
            raise ValueError(f"Error writing {where}: os_error_code='{errno.ENOSPC}'")
        raise OSError(errno.ENOSPC, "No space left", f"{where}/d")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fails)
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoint.save(tmp_path / "new" / "c", state_of(1), force=force)
    assert raised.value.filename == str(tmp_path / "new" / "c")
    assert os.listdir(tmp_path) == []


def test_without_locks_nothing_is_taken_for_a_killed_writers(tmp_path, monkeypatch):
    monkeypatch.setattr(_replacement, "fcntl", None)
    left = f".{_replacement._mark(tmp_path / 'c')}0.unfinished"
    (tmp_path / left).mkdir()
    checkpoint.save(tmp_path / "c", state_of(1), force=True)
    assert set(os.listdir(tmp_path)) == {left, "c"}


def test_one_writer_at_a_time_acts(tmp_path):
    def alone():
        with _replacement._locked(tmp_path, wait=False) as alone:
            return alone

    path = checkpoint._files.absolute(tmp_path / "c")
    assert alone() and not _replacement.in_turn(path, alone)


def test_what_is_not_finished_beside_the_path_makes_way(tmp_path):
    for suffix in (".replacement", ".replaced"):
        (tmp_path / f"c{suffix}" / "part").mkdir(parents=True)
    for number in (1, 2):
        checkpoint.save(tmp_path / "c", state_of(number), force=True)
    assert values_in(tmp_path) == [2]


def test_what_was_restored_before_a_save_is_not_what_is_left_after_it(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(tmp_path / "c.replacement", state_of(500))
    assert value(path) == 500
    checkpoint.save(path, state_of(1), force=True)
    path.rename(tmp_path / "c.replacement")  # as another process that was killed
    checkpoint.save(path, state_of(2), force=True)
    assert values_in(tmp_path) == [1, 2]
