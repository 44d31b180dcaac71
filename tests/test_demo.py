"""The demo through the command line, as a visitor runs it, and what it says in words."""

import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from emaopt import demo


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that ran in a directory with a file of the user's."""
    out = tmp_path_factory.mktemp("demo")
    (out / "notes.txt").write_text("mine")
    arguments = ("--steps", 60, "--seeds", 2, "--seed", 3, "--out", out)
    process = command("-m", "emaopt", "demo", *arguments)
    return out, process, " ".join(process.stdout.split())  # words, however wrapped


@pytest.mark.slow
def test_demo_serves_exactly_the_average_and_resumes_bit_for_bit(finished):
    _, process, words = finished
    assert process.returncode == 0, process.stderr
    assert "exactly those of the average in the training process" in words
    assert "arrays (parameters, optimizer state, average) are bit for bit" in words
    assert "± sd over 2 seeds" in words
    last = process.stdout.splitlines()[-1]
    assert last == "Next: https://emaopt.github.io/emaopt/getting-started/"
    assert process.stderr == ""


@pytest.mark.slow
def test_server_run_by_hand_gives_the_numbers_that_the_demo_printed(finished):
    out, _, words = finished
    process = command("serve.py", "checkpoint", cwd=out)
    answer = json.loads(process.stdout)
    assert answer.keys() == {"accuracy", "loss", "emaopt_importable"}
    assert answer["emaopt_importable"] is False
    assert f"accuracy {answer['accuracy']!r} and loss {answer['loss']!r}:" in words


@pytest.mark.slow
def test_server_with_other_numbers_fails_the_check(finished):
    out, _, _ = finished
    with pytest.raises(demo.CheckFailed, match="the server says"):
        demo.serve(out, (0.25, 0.5), "step 30")


@pytest.mark.slow
def test_demo_draws_a_picture_of_readme_size(finished):
    out, _, _ = finished
    header = (out / "curves.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:24])
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert 1000 <= width <= 2000 and 500 <= height <= 1500


@pytest.mark.slow
def test_demo_replaces_its_own_files_and_no_others(finished):
    out, _, _ = finished
    arguments = ("--steps", 20, "--seeds", 1, "--out", out)
    process = command("-m", "emaopt", "demo", *arguments)
    assert process.returncode == 0, process.stderr
    assert "one seed shows nothing about the spread" in " ".join(process.stdout.split())
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--steps", 19), 2, "Invalid value for '--steps': "),
        (("--seeds", 0), 2, "Invalid value for '--seeds': "),
        (("--seed", -1), 2, "Invalid value for '--seed': "),
        (("--out", __file__), 2, "Invalid value for '--out': takes a directory"),
        (("--out", f"{__file__}/out"), 1, "Not a directory"),
    ],
)
def test_bad_option_is_one_line_on_stderr(arguments, code, message):
    process = command("-m", "emaopt", "demo", *arguments)
    assert process.returncode == code
    assert message in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "cli"), ("matplotlib", "demo"), ("flax", "demo")]
)
def test_missing_package_is_named_with_what_to_install(tmp_path, package, extra):
    script = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = ['demo']; "
        "from emaopt.__main__ import main; main()"
    )
    process = command("-c", script, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr == (
        f"emaopt: {package} is not installed: pip install 'emaopt[{extra}]'\n"
    )


@pytest.mark.parametrize("name", ["checkpoint", "serve.py", "curves.png"])
def test_demo_refuses_to_replace_what_it_did_not_write(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(demo.CheckFailed, match=name):
        demo.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("raw", "averaged", "says"),
    [
        ([0.30, 0.31, 0.32], [0.20, 0.22, 0.21], "The average helps: its loss is 0.1000"),
        ([0.20, 0.22, 0.21], [0.30, 0.31, 0.32], "The average does not help, it harms"),
        ([0.20, 0.30], [0.30, 0.19], "does not help by more than 2 seeds can show"),
        ([0.20, 0.20], [0.20, 0.20], "does not help by more than 2 seeds can show"),
        ([0.30], [0.20], "one seed shows nothing about the spread"),
    ],
)
def test_verdict_follows_from_the_paired_difference(raw, averaged, says):
    assert says in demo.verdict(np.array(raw), np.array(averaged))


def test_differences_sees_dtype_shape_and_every_bit():
    state = {"a": np.zeros(2, np.float32), "b": np.array([np.nan]), "c": np.zeros(2)}
    other = {"a": np.zeros(2), "b": np.array([np.nan]), "c": np.array([0.0, -0.0])}
    assert demo.differences(state, other) == ["a", "c"]


def test_server_does_not_mention_emaopt_in_an_import():
    source = pathlib.Path(demo.digits.__file__).read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "emaopt" in line]
