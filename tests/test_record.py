"""The record in a checkpoint is right, or an error says what is wrong with it."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from records import edit, record_of
from test_places import same

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-2), 0.9, zero_init=True)


def trained():
    """A state with a tree beside the parameters that only their way tells from them."""
    params = {
        "w": jnp.arange(4.0),
        "empty": jnp.zeros((0, 3)),
        "g": {"value": jnp.ones(2)},
    }
    state = {"params": params, "sarams": jax.tree.map(lambda x: x + 9, params)}
    return state | {"opt_state": TX.init(params)}


STATE = trained()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "c"
    checkpoint.save(path, STATE, params="params")
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "c")


def file_of(path):
    return path / "_CHECKPOINT_METADATA"


def right_or_refused(path):
    """Whether what is read is right; else the error names the function and the path."""
    served = STATE["opt_state"].averaging.average
    try:
        same(checkpoint.restore(path, STATE, params="params"), STATE)
        same(checkpoint.load_averaged(path, target=served), served)
        return True
    except ValueError as error:
        assert str(error).startswith(("restore: ", "load_averaged: ")), error
        assert str(path) in str(error)
        return False


def flips(content, step):
    for i in range(0, 8 * len(content), step):
        changed = bytearray(content)
        changed[i // 8] ^= 1 << i % 8
        yield bytes(changed)


@pytest.mark.parametrize("step", [101, pytest.param(3, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_an_error_or_changes_nothing(step, copy):
    file, refused = file_of(copy), 0
    content = file.read_bytes()
    for changed in flips(content, step):
        file.write_bytes(changed)
        refused += not right_or_refused(copy)
    assert refused >= 8 * len(content) / step / 2
    file.write_bytes(content)
    assert right_or_refused(copy)


def test_a_record_of_an_item_is_checked_too(tmp_path):
    names = ("params", "sarams", "opt_state")
    with ocp.CheckpointManager(
        tmp_path, handler_registry=checkpoint.handler_registry(params="params")
    ) as manager:
        args = {name: ocp.args.StandardSave(STATE[name]) for name in names}
        manager.save(1, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
    path = tmp_path / "1"
    assert right_or_refused(path)
    file = path / "opt_state" / "_METADATA"

    def other(record):
        record["params"] = ["sarams"]

    content = file.read_text()
    edit(file, other)
    with pytest.raises(ValueError, match=r"have records that differ"):
        checkpoint.load_averaged(path)
    file.write_text(content)
    edit(file, other, seal=False)
    with pytest.raises(ValueError, match=r"opt_state/_METADATA has .* its checksum is"):
        checkpoint.load_averaged(path)


NONSENSE = (None, 0, -1, 1.5, "x", [], {}, [1], [[]], ["no", "such"], [["a"], 1], [[[]]])
ANY = ("version", "params", "average", "field", "more", "empty", "values", "checksums")
WRONG = [
    *((field, value) for field in ANY for value in NONSENSE),
    *((field, value) for field in ("metrics_of", "in_place") for value in NONSENSE),
    ("version", True),
    ("params", ["sarams", "w"]),
    ("average", ["opt_state"]),
    ("average", ["opt_state", "inner_state", "0"]),
    ("field", "center"),
    ("checksums", [[["params", "w"], "float32", -1]]),
    ("checksums", [[["params", "w"], "float32", 2**32]]),
    ("empty", [[["no"], [0], "float32"]]),
    ("empty", [[["params", "w"], [0], "float32"]]),
    ("empty", [[["params", "empty"], [10**12, 10**12], "float32"]]),
    ("empty", [[["params", "empty"], [0, 3], "float33"]]),
    ("more", [{"params": ["params"], "average": ["x"], "field": "average"}]),
    ("more", [{"params": ["params"], "average": ["x"]}]),
    ("unknown", 1),
]
SAYS_NOTHING = [("more", []), ("checksums", []), ("values", []), ("values", [[]])]


@pytest.mark.quick(8)
@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("case", [case for case in WRONG if case not in SAYS_NOTHING])
def test_each_field_is_checked(case, version, copy):
    """Also where a checksum over the record fits it, or none is there to tell."""

    def change(record):
        record.update(version=version)
        record.update([case])

    edit(file_of(copy), change)
    if version < 3:
        edit(file_of(copy), lambda record: record.pop("sum"), seal=False)
    assert not right_or_refused(copy)
    with pytest.raises(ValueError, match=r"record|size 0|newer|lacks .*/empty"):
        checkpoint.restore(copy, STATE, params="params")


def test_what_lacks_and_has_a_checksum_is_named(copy):
    def change(record):
        record["checksums"] = [[["no"], "float32", 1]]

    edit(file_of(copy), change)
    with pytest.raises(ValueError, match=r"lacks no, of which its record has checksums"):
        checkpoint.load_averaged(copy)


def test_formats_of_before_are_read(copy):
    def older(record):
        record["version"] = 1
        del record["sum"], record["field"]
        record["checksums"] = [[["params", "w"], "float32", 1]]  # of another definition

    content = json.loads(file_of(copy).read_text())
    older(content["custom_metadata"]["emaopt"])
    file_of(copy).write_text(json.dumps(content))
    assert right_or_refused(copy)


def test_a_newer_format_and_unknown_fields_are_named(copy):
    edit(file_of(copy), lambda record: record.update(extra=1))
    with pytest.raises(ValueError, match=r"does not write, \['extra'\]"):
        checkpoint.load_averaged(copy)
    edit(file_of(copy), lambda record: record.update(version=4))
    with pytest.raises(ValueError, match=r"format 4, .* newer emaopt; .* up to 3"):
        checkpoint.load_averaged(copy)


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("field", ["params", "empty", "values", "checksums", "extra"])
def test_nothing_in_a_record_goes_deep_or_takes_memory(field, copy):
    file = file_of(copy)
    content = file.read_text()
    file.write_text(content.replace('"version"', f'"{field}": {DEEP}, "version"'))
    assert not right_or_refused(copy)

    edit_ = [[["params", "empty"], [0, 2**31 - 1], "float32"]]
    file.write_text(content)
    edit(file, lambda record: record.update(empty=edit_ * 2))
    tracemalloc.start()
    checkpoint.load_averaged(copy)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_state_says_itself_that_it_was_swapped(copy):
    """Without the record the averages are the same, but for arrays of size 0."""
    file = file_of(copy)
    content = json.loads(file.read_text())
    del content["custom_metadata"]["emaopt"]
    file.write_text(json.dumps(content))
    served = STATE["opt_state"].averaging.average
    loaded = checkpoint.load_averaged(copy)
    same((loaded["w"], loaded["g"]), (served["w"], served["g"]))
    with pytest.raises(ValueError, match=r"lacks .*params/empty"):
        checkpoint.restore(copy, STATE, params="params")


def test_a_combination_has_a_record_with_a_checksum(saved, tmp_path):
    out = tmp_path / "out"
    checkpoint.combine([saved], [1.0], out, custom_metadata={"note": {1: "a"}})
    assert record_of(file_of(out), "emaopt_combination")["note"] == {"1": "a"}
    content = file_of(out).read_bytes()
    assert b'"params"' in content
    file_of(out).write_bytes(content.replace(b'"params"', b'"qarams"', 1))
    with pytest.raises(ValueError, match=r"emaopt_combination.* that is damaged"):
        checkpoint.load_averaged(out)
    with pytest.raises(ValueError, match=r"combine: custom_metadata has .'weights'"):
        checkpoint.combine(
            [saved], [1.0], tmp_path / "b", custom_metadata={"weights": "best"}
        )
