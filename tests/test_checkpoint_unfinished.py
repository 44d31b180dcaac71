"""What is not finished is not read, whichever way Orbax marks that it is."""

import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.path import atomicity

import emaopt
from emaopt import checkpoint

A = ocp.args
TX = emaopt.averaged(optax.sgd(1.0), 0.5)
IN_PLACE = ocp.CheckpointManagerOptions(
    temporary_path_class=atomicity.CommitFileTemporaryPath
)
MARK = "commit_success.txt"


def state_of(number):
    params = {"w": jnp.full(2, float(number))}
    return {"params": params, "opt_state": TX.init(params)}


def run_of(directory, *, in_place, ours=True, steps=(1, 2)):
    options = IN_PLACE if in_place else None
    registry = checkpoint.handler_registry() if ours else None
    with ocp.CheckpointManager(
        directory, options=options, handler_registry=registry
    ) as manager:
        for step in steps:
            manager.save(step, args=A.StandardSave(state_of(step)))
    return directory


def without_marks(path):
    found = [*path.rglob(MARK)]
    for mark in found:
        mark.unlink()
    return found


def with_manager(path):
    directory, step = path.parent, path.name
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(directory, handler_registry=registry) as manager:
        return manager.restore(int(step), args=A.StandardRestore(state_of(0)))


READERS = {
    "restore": lambda path: checkpoint.restore(path, state_of(0)),
    "restore of the item": lambda p: checkpoint.restore(p / "default", state_of(0)),
    "load_averaged": checkpoint.load_averaged,
    "describe": checkpoint.describe,
    "average": lambda path: checkpoint.average([path], path.parent / "out"),
    "combine": lambda path: checkpoint.combine([path], [1.0], path.parent / "out"),
    "export": lambda path: checkpoint.export_safetensors(path, path.parent / "out"),
    "manager": with_manager,
}


@pytest.mark.parametrize("read", READERS)
def test_a_step_that_lacks_its_mark_is_read_by_nobody(read, tmp_path):
    step = run_of(tmp_path, in_place=True) / "2"
    without_marks(step)
    with pytest.raises(ValueError, match=rf"unfinished save: it lacks {MARK}"):
        READERS[read](step)


@pytest.mark.parametrize("read", ["restore", "load_averaged", "describe", "average"])
def test_a_directory_with_a_temporary_name_is_read_by_nobody(read, tmp_path):
    run_of(tmp_path, in_place=False)
    temporary = (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with pytest.raises(ValueError, match=r"its name has .orbax-checkpoint-tmp in it"):
        READERS[read](temporary)
    with pytest.raises(ValueError, match=r"its name has .orbax-checkpoint-tmp in it"):
        READERS["restore"](temporary / "default")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_an_unfinished_step_is_left_out_of_an_average(ours, in_place, tmp_path):
    run_of(tmp_path, in_place=in_place, ours=ours, steps=(1, 2, 3))
    if in_place:
        without_marks(tmp_path / "2")
    else:
        (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    said = []
    weights = checkpoint.average([tmp_path], tmp_path / "out", report=said.append)
    assert [name[-2:] for name in weights] == ["/1", "/3"]
    assert len(said) == 1 and "/2" in said[0] and "was not finished" in said[0]
    np.testing.assert_array_equal(
        checkpoint.load_averaged(tmp_path / "out")["w"], [2.0, 2.0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_kill_in_mid_save_leaves_is_read_by_nobody(in_place, ours, tmp_path):
    kind = "CommitFileTemporaryPath" if in_place else "AtomicRenameTemporaryPath"
    program = f"""
        import os, pathlib, sys
        sys.path.insert(0, {__file__.rpartition("/")[0]!r})
        import test_checkpoint_unfinished as test

        kind = test.atomicity.{kind}
        finalize = kind.finalize

        async def die(self):
            if self.get_final().name == "2":
                os._exit(9)
            await finalize(self)

        kind.finalize = die
        test.run_of(pathlib.Path({str(tmp_path)!r}), in_place={in_place}, ours={ours})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert killed.returncode == 9
    (left,) = tmp_path.glob("2*")
    why = "has no commit_timestamp_nsecs" if in_place else "its name has"
    for read in ("restore", "load_averaged", "describe"):
        with pytest.raises(ValueError, match=f"unfinished save: its .*{why[4:]}"):
            READERS[read](left)
    checkpoint.load_averaged(tmp_path / "1")


@pytest.mark.parametrize("mark_of_items", [False, True])
def test_steps_of_an_orbax_that_renames_without_a_mark_are_read(mark_of_items, tmp_path):
    """As older versions do: neither the step has the mark, nor what stands around it."""
    run_of(tmp_path, in_place=False)
    without_marks(tmp_path)
    for step in (1, 2):
        np.testing.assert_array_equal(
            checkpoint.load_averaged(tmp_path / str(step))["w"], [step] * 2
        )
    if mark_of_items:
        (tmp_path / "2" / "default" / MARK).touch()
        with pytest.raises(ValueError, match=f"lacks {MARK}, and its items have it"):
            checkpoint.load_averaged(tmp_path / "2")


def test_steps_before_the_marks_came_are_read_and_later_ones_without_are_not(tmp_path):
    run_of(tmp_path, in_place=False, ours=False, steps=(1, 2, 3))
    for step in (1, 3):
        without_marks(tmp_path / str(step))
    (tmp_path / "2" / MARK).touch()
    checkpoint.describe(tmp_path / "1")
    with pytest.raises(ValueError, match=f"lacks {MARK}, and steps before it have it"):
        checkpoint.describe(tmp_path / "3")
    (tmp_path / "3" / MARK).touch()  # as the message says
    checkpoint.describe(tmp_path / "3")


def test_a_lone_step_says_itself_that_it_was_written_in_place(tmp_path):
    step = run_of(tmp_path, in_place=True, steps=(1,)) / "1"
    without_marks(step)
    with pytest.raises(ValueError, match="by its record it was written in place"):
        checkpoint.describe(step)


def test_marks_of_what_is_no_step_of_the_run_tell_nothing(tmp_path):
    run_of(tmp_path, in_place=False, ours=False, steps=(1, 2))
    without_marks(tmp_path)
    (tmp_path / "1" / MARK).touch()
    (tmp_path / "1").rename(tmp_path / "best-1")
    checkpoint.describe(tmp_path / "2")
    checkpoint.save(tmp_path / "2" / "kept", state_of(3))  # a checkpoint by itself
    (tmp_path / "2" / "kept" / MARK).touch()
    checkpoint.describe(tmp_path / "2")


def test_an_item_of_a_step_that_has_its_mark_needs_none(tmp_path):
    step = run_of(tmp_path, in_place=True) / "2"
    (step / "default" / MARK).unlink(missing_ok=True)
    found = checkpoint.restore(step / "default", state_of(0))
    np.testing.assert_array_equal(found["params"]["w"], [2.0, 2.0])


def test_a_checkpoint_without_times_or_marks_is_read(tmp_path):
    """Such as Orbax wrote before it had metadata of steps, or a copy of the arrays."""
    checkpoint.save(tmp_path / "1", state_of(1))
    checkpoint.save(tmp_path / "2", state_of(2))
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "2" / MARK).unlink(missing_ok=True)
    np.testing.assert_array_equal(
        checkpoint.load_averaged(tmp_path / "2")["w"], [2.0, 2.0]
    )


def test_of_stores_that_know_no_renaming_orbax_is_asked(tmp_path, monkeypatch):
    """As for gs://, where it writes in place if nothing else is said."""
    from orbax.checkpoint.path import atomicity_defaults

    checkpoint.save(tmp_path / "c", state_of(1))
    without_marks(tmp_path / "c")
    kind = atomicity.CommitFileTemporaryPath
    monkeypatch.setattr(
        atomicity_defaults, "get_default_temporary_path_class", lambda *_, **__: kind
    )
    with pytest.raises(ValueError, match=f"unfinished save: it lacks {MARK}. It is"):
        checkpoint.load_averaged(tmp_path / "c")
