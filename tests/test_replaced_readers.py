"""A reader beside a writer gets one whole state, or says what happened."""

import jax.numpy as jnp
import optax
import pytest
from safetensors.numpy import load_file

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _items, _read, _stream

TX = emaopt.averaged(optax.sgd(1.0), 0.5)


def state_of(value, size=1000):
    params = {"a": jnp.full(size, float(value)), "b": jnp.full(size, float(value))}
    return {"params": params, "opt_state": TX.init(params)}


def restored(path):
    return checkpoint.restore(path, state_of(0))["params"]


def exported(path):
    checkpoint.export_safetensors(path, f"{path}.st", force=True)
    return load_file(f"{path}.st")


def averaged(path):
    checkpoint.average([path], f"{path}.mean", force=True)
    return checkpoint.load_averaged(f"{path}.mean")


READERS = [checkpoint.load_averaged, restored, exported, averaged]


def before(monkeypatch, module, name, times, act):
    """Lets something happen before the first calls of a function."""
    real, count = getattr(module, name), iter(range(times))

    def later(*arguments, **options):
        if next(count, None) is not None:
            act()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, later)


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "c", state_of(1))
    return tmp_path / "c"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("where", ["read", "directories_of"])
@pytest.mark.parametrize("checksums", [False, True])
def test_a_reader_gets_one_whole_state(reader, where, checksums, path, monkeypatch):
    module = _read if where == "read" else _items
    if where == "read" and reader in (exported, averaged):
        module = _stream

    def save():
        checkpoint.save(path, state_of(2), force=True, checksums=checksums)

    before(monkeypatch, module, where, 1, save)
    found = reader(path)
    assert {float(x) for leaf in found.values() for x in leaf} == {2.0}


def test_a_reader_beside_a_writer_that_does_not_pause_says_so(path, monkeypatch):
    def save():
        checkpoint.save(path, state_of(2), force=True)

    before(monkeypatch, _read, "read", 100, save)
    with pytest.raises(
        ValueError, match=r"load_averaged: .* replaced by a save"
    ) as raised:
        checkpoint.load_averaged(path)
    assert "damaged" not in str(raised.value)


def test_an_average_of_what_was_replaced_is_not_written(path, monkeypatch):
    def save():
        checkpoint.save(path, state_of(2), force=True)

    before(monkeypatch, _stream, "read", 100, save)
    with pytest.raises(ValueError, match=r"average: .* replaced by a save"):
        checkpoint.average([path], f"{path}.mean")
    assert [p.name for p in path.parent.iterdir()] == ["c"]


def test_an_error_that_has_another_reason_stays_and_comes_at_once(path, monkeypatch):
    count = []
    before(monkeypatch, _items, "directories_of", 100, lambda: count.append(1))
    (path / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"the metadata in .* cannot be read"):
        checkpoint.load_averaged(path)
    assert count == [1]
