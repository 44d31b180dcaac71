"""Files of all writers are whole, and are nobody else's."""

import errno
import json
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import emaopt
from emaopt import checkpoint, demo, plots
from emaopt._output import writing

TX = emaopt.averaged(optax.sgd(1.0), 0.5)


def state_of(value, **more):
    params = {"w": jnp.full(2, float(value)), **more}
    return {"params": params, "opt_state": TX.init(params)}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "c", state_of(1))
    return tmp_path / "c"


def _demo(out):
    with demo.staged(out):
        pass


# Each writer of a file: called with a checkpoint and the place of the file.
WRITERS = {
    "export": lambda source, out: checkpoint.export_safetensors(source, out, force=True),
    "plot": lambda source, out: plots.save(plots.new_axes(), out),
    "demo": lambda source, out: _demo(out.parent),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_leaves_what_others_have_beside_its_place(writer, saved, tmp_path):
    out = tmp_path / "made" / ("serve.py" if writer == "demo" else "file")
    out.parent.mkdir()
    (tmp_path / "mine").write_text("precious")
    beside = out.with_name(f"{out.name}.unfinished")
    beside.symlink_to(tmp_path / "mine")
    WRITERS[writer](saved, out)
    assert (tmp_path / "mine").read_text() == "precious"
    assert beside.is_symlink() and set(out.parent.iterdir()) == {out, beside}


def test_of_two_writers_the_last_one_has_the_file(tmp_path):
    with writing(tmp_path / "file") as first:
        first.write(b"1")
        with writing(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "file").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="full"), writing(tmp_path / "file") as file:
        file.write(b"part")
        raise OSError("full")
    assert (tmp_path / "file").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(saved, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "mine")
    checkpoint.export_safetensors(saved, tmp_path / "out", force=True)
    assert (tmp_path / "mine").read_text() == "precious"
    assert load_file(tmp_path / "out")["w"].tolist() == [1, 1]


def test_exports_to_one_file_at_once_are_each_whole(saved, tmp_path):
    checkpoint.save(tmp_path / "d", state_of(2))

    def other(done, total):
        arguments = (tmp_path / "d", tmp_path / "out")
        thread = threading.Thread(target=checkpoint.export_safetensors, args=arguments)
        thread.start()
        thread.join()

    checkpoint.export_safetensors(saved, tmp_path / "out", progress=other)
    assert load_file(tmp_path / "out")["w"].tolist() == [1, 1]


# Spellings of the source, or of places in it: all of them are refused.
SPELLINGS = ["c", "c/manifest.ocdbt", "c/new/file", "./c/../c", "link", "link/file", "."]


@pytest.mark.parametrize("place", SPELLINGS)
def test_export_refuses_its_source(place, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(ValueError, match=r"export_safetensors: .* elsewhere"):
        checkpoint.export_safetensors(saved, f"{tmp_path}/{place}", force=True)
    assert checkpoint.load_averaged(saved)["w"].tolist() == [1, 1]


def test_export_refuses_a_directory_before_it_reads(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a directory; give the file"):
        checkpoint.export_safetensors(saved, tmp_path / "empty", force=True)


def test_export_refuses_a_name_that_the_format_keeps(tmp_path):
    checkpoint.save(tmp_path / "c", state_of(1, __metadata__=jnp.ones(2)))
    with pytest.raises(ValueError, match=r"is called '__metadata__'.* rename it"):
        checkpoint.export_safetensors(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model*", "[m]odel", "model?"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_average_leaves_the_saves_of_others(name, fails, saved, tmp_path):
    other = tmp_path / "o" / "model5.orbax-checkpoint-tmp"
    other.mkdir(parents=True)

    def progress(done, total):
        if fails:
            raise RuntimeError("stop")

    try:
        checkpoint.average([saved], tmp_path / "o" / name, progress=progress)
    except Exception as error:
        assert fails, error
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert left == {other.name} | (set() if fails else {name})


def test_an_error_on_the_way_stays_and_is_none_of_the_place(saved, tmp_path):
    def progress(done, total):
        raise OSError(errno.EIO, "of the reader")

    with pytest.raises(OSError, match="of the reader") as raised:
        checkpoint.average([saved], tmp_path / "o" / "out", progress=progress)
    assert raised.value.filename is None
    assert not (tmp_path / "o").exists()


def test_averages_to_one_place_at_once_are_each_whole(saved, tmp_path):
    checkpoint.save(tmp_path / "d", state_of(2))
    out, begun = tmp_path / "out", []

    def other(done, total):
        if not begun:
            begun.append(1)
            arguments, force = ([tmp_path / "d"], out), {"force": True}
            thread = threading.Thread(
                target=checkpoint.average, args=arguments, kwargs=force
            )
            thread.start()
            thread.join()

    checkpoint.average([saved], out, force=True, progress=other)
    found = checkpoint.load_averaged(out)["w"]
    np.testing.assert_array_equal(found, [1, 1])
    record = json.loads((out / "_CHECKPOINT_METADATA").read_text())
    assert record["custom_metadata"]["emaopt_combination"]["checkpoints"] == [str(saved)]
    assert {p.name for p in tmp_path.iterdir()} == {"c", "d", "out"}
