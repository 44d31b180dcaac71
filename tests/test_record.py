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
from emaopt.checkpoint import _record

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


def saved_as_items(directory):
    with ocp.CheckpointManager(
        directory, handler_registry=checkpoint.handler_registry(params="params")
    ) as manager:
        args = {name: ocp.args.StandardSave(tree) for name, tree in STATE.items()}
        manager.save(1, args=ocp.args.Composite(**args))
    return directory / "1"


def test_a_record_of_an_item_is_checked_too(tmp_path):
    path = saved_as_items(tmp_path)
    assert right_or_refused(path)
    file = path / "opt_state" / "_METADATA"

    def other(record):
        record["params"] = ["sarams"]

    content = file.read_text()
    for change in (other, lambda record: record.pop("field")):
        edit(file, change)
        with pytest.raises(ValueError, match=r"have records that differ"):
            checkpoint.load_averaged(path)
        file.write_text(content)
    edit(file, other, seal=False)
    with pytest.raises(ValueError, match=r"opt_state/_METADATA has .* its checksum is"):
        checkpoint.load_averaged(path)


def test_parameters_that_were_kept_alone_are_the_averages(tmp_path):
    path = saved_as_items(tmp_path)
    shutil.rmtree(path / "opt_state")
    same(checkpoint.load_averaged(path), STATE["opt_state"].averaging.average)


def test_an_item_that_lost_its_metadata_is_named_and_a_checkpoint_there_is_none(tmp_path):
    path = saved_as_items(tmp_path)
    checkpoint.save(path / "another", STATE, params="params")
    assert right_or_refused(path)
    (path / "sarams" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"sarams has arrays, but lacks its _METADATA"):
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


def test_a_record_without_its_checksum_or_of_a_format_that_had_none_is_refused(copy):
    def older(record):
        record["version"] = 2

    content = file_of(copy).read_text()
    edit(file_of(copy), lambda record: record.pop("sum"), seal=False)
    with pytest.raises(ValueError, match="its checksum is of another content"):
        checkpoint.load_averaged(copy)
    file_of(copy).write_text(content)
    edit(file_of(copy), older)
    with pytest.raises(ValueError, match="of format 2, it has a checksum"):
        checkpoint.load_averaged(copy)


def test_a_record_that_lost_its_place_is_refused(copy):
    content = file_of(copy).read_text()
    for entry in ("custom_metadata", "emaopt"):
        file_of(copy).write_text(content.replace(f'"{entry}"', '"other"', 1))
        with pytest.raises(ValueError, match="has emaopt's record under 'other'"):
            checkpoint.load_averaged(copy)


def test_an_empty_array_has_no_elements_and_a_place_no_other_fields(copy):
    content = file_of(copy).read_text()
    place = {"params": ["params"], "average": ["opt_state", "averaging"], "x": 1}
    for field, value in (
        ("empty", [[["params", "empty"], [2**30, 2**30], "float32"]]),
        ("more", [place | {"field": "average"}]),
    ):
        edit(file_of(copy), lambda record, entry=(field, value): record.update([entry]))
        with pytest.raises(ValueError, match=f"its {field} is"):
            checkpoint.load_averaged(copy)
        file_of(copy).write_text(content)


def test_what_is_nested_too_deep_is_said_to_be():
    deep = []
    for _ in range(200_000):
        deep = [deep]
    record = {"version": 3, "params": deep}
    with pytest.raises(ValueError, match=r"load: file has .* it is nested too deep"):
        _record.checked("load", "file", {"emaopt": record}, "emaopt")


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
    edit(file_of(copy), lambda record: record.update(version=5))
    with pytest.raises(ValueError, match=r"format 5, .* newer emaopt; .* up to 4"):
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


def test_where_nothing_says_what_was_empty_the_reader_may_do_without(copy):
    file_of(copy).unlink()
    with pytest.raises(ValueError, match=r"lost its _CHECKPOINT_METADATA.*params/empty"):
        checkpoint.load_averaged(copy)
    served = STATE["opt_state"].averaging.average
    loaded = checkpoint.load_averaged(copy, at="params")
    same((loaded["w"], loaded["g"]), (served["w"], served["g"]))


def test_a_record_names_all_that_was_swapped(tmp_path):
    one = {name: STATE[name] for name in ("params", "opt_state")}
    names = ("a/opt_state/averaging", "b/opt_state/averaging")
    checkpoint.save(tmp_path / "c", {"a": one, "b": one}, name=names)
    edit(file_of(tmp_path / "c"), lambda record: record.pop("more"))
    with pytest.raises(ValueError, match="but swapped are b/opt_state/averaging, too"):
        checkpoint.load_averaged(tmp_path / "c")


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
