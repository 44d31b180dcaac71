"""The command line where disks are full, jobs are stopped and terminals are plain."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load
from typer.testing import CliRunner

import emaopt
from emaopt import __main__, _interrupts, checkpoint, cli
from emaopt.checkpoint import _stream

RED = "\x1b[31m"
TX = optax.named_chain(("sgd", optax.sgd(1.0)), ("ema:0.5", emaopt.average_params(0.5)))


def command(*arguments, charset="utf-8", **environment):
    runner = CliRunner(charset=charset)
    return runner.invoke(cli.app, [str(a) for a in arguments], env=environment)


def saved(path, params, num_updates=0):
    opt_state = TX.init(params)
    average = opt_state["ema:0.5"]
    opt_state["ema:0.5"] = average._replace(num_updates=jnp.int32(num_updates))
    checkpoint.save(path, {"params": params, "opt_state": opt_state})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with parameters that no compression makes small."""
    directory = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for step in (1, 2):
        params = {name: rng.standard_normal(8192).astype("f") for name in "ab"}
        saved(directory / str(step), params, step)
    return directory


def writers(run, out):
    return {
        "average": ("average", run, "--out", out),
        "average over another": ("average", run, "--out", out, "--force"),
        "synthesize": ("synthesize", run, "--target", "ema:0.5", "--out", out),
        "export": ("export", run / "2", "--safetensors", out),
        "profile": ("profile", "0.9", "--plot", out),
    }


WRITERS = ["average", "average over another", "export", "profile", "synthesize"]


def everything(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@contextlib.contextmanager
def files_up_to(size):
    """No file gets larger, as if a disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_nothing_is_left(run, writer, tmp_path):
    out = tmp_path / "new" / "out"
    if writer == "average over another":
        out = shutil.copytree(run / "1", tmp_path / "out")
    before = everything(tmp_path)
    with files_up_to(4096):
        result = command(*writers(run, out)[writer])
    assert result.exit_code == 1
    name = writer.split()[0]
    assert result.stderr == f"emaopt {name}: [Errno 27] File too large: '{out}'\n"
    assert everything(tmp_path) == before


@contextlib.contextmanager
def heard(number):
    """Lets Python hear a signal, which a shell has background jobs ignore."""
    handler = signal.SIG_DFL
    if number == signal.SIGINT:
        handler = signal.default_int_handler
    before = signal.signal(number, handler)
    try:
        yield handler
    finally:
        signal.signal(number, before)


def test_a_ctrl_c_that_python_drops_comes_again():
    class Collected:
        def __del__(self):
            raise KeyboardInterrupt

    hook, sys.unraisablehook = sys.unraisablehook, __main__._unraised
    try:
        with heard(signal.SIGINT), pytest.raises(KeyboardInterrupt):
            Collected()
            time.sleep(10)
    finally:
        sys.unraisablehook = hook


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("writer", [w for w in WRITERS if w != "profile"])
def test_a_signal_is_one_line_and_nothing_is_left(
    run, writer, name, tmp_path, monkeypatch
):
    number, out = signal.Signals[name], tmp_path / "new" / "out"
    if writer == "average over another":
        out = shutil.copytree(run / "1", tmp_path / "out")

    def halfway(done, total):
        if done >= total / 2:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # another, while files are removed

    for module in (cli, cli._conversions):
        monkeypatch.setattr(
            module, "progress_bar", lambda _: contextlib.nullcontext(halfway)
        )
    monkeypatch.setattr(_stream, "BATCH", 8)
    before = everything(tmp_path)
    with heard(number) as handler:
        result = command(*writers(run, out)[writer])
        assert signal.getsignal(number) == handler
    assert result.exit_code == 128 + number
    assert result.stderr == f"emaopt {writer.split()[0]}: stopped by {name}.\n"
    assert everything(tmp_path) == before


def test_renames_are_not_disturbed_by_signals_but_followed_by_them():
    done = []
    with heard(signal.SIGINT) as handler:
        with pytest.raises(KeyboardInterrupt):
            with _interrupts.undisturbed():
                signal.raise_signal(signal.SIGINT)
                done.append("renamed")
        assert done and signal.getsignal(signal.SIGINT) is handler


def process(*arguments, **options):
    words = [sys.executable, "-m", "emaopt", *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("inspect", "--json"), ("inspect",), ("--help",)])
def test_a_closed_pipe_is_silent(run, arguments):
    name, *options = arguments
    paths = [] if name == "--help" else [run / "1"]
    with process(name, *paths, *options, stdout=subprocess.PIPE) as running:
        running.stdout.close()
        assert (running.stderr.read(), running.wait()) == ("", 128 + signal.SIGPIPE)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("arguments", [("profile", "0.9"), ("profile", "--help")])
def test_an_output_that_takes_nothing_is_one_line(arguments):
    with open("/dev/full", "w") as full, process(*arguments, stdout=full) as running:
        said = running.stderr.read()
        assert running.wait() == 1
    assert said == "emaopt: the output cannot be written: No space left on device.\n"


@pytest.mark.slow
def test_no_file_gets_the_number_of_a_closed_output(run, tmp_path):
    """What is written is whole, and nothing is printed into it."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "emaopt", *writers(run, out)["export"]]
    script = " ".join(f"'{word}'" for word in words) + " >&- 2>&-"
    assert subprocess.run(["sh", "-c", script]).returncode == 0
    assert load(out.read_bytes()).keys() == {"a", "b"}


@pytest.mark.slow
def test_the_demo_leaves_nothing_if_the_disk_is_full(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "notes").write_text("mine")
    out = tmp_path / "new" / "demo"
    script = f"ulimit -f 8; '{sys.executable}' -m emaopt demo --steps 20 --seeds 1 --out "
    done = subprocess.run(
        ["sh", "-c", f"{script} '{out}'"], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"emaopt demo: [Errno 27] File too large: '{out}'\n"
    assert everything(tmp_path) == ["notes"]


def test_names_are_shown_escaped_and_whole(tmp_path):
    names = ["red" + RED, "two\nlines", "[bold]x[/bold]", "groß", "θ", "\u202eright"]
    path = saved(tmp_path / f"c{RED}_1", {name: jnp.ones(2) for name in names})
    shown = ["red\\x1b[31m", "two\\nlines", "[bold]x[/bold]", "\\u202eright"]
    said = command("inspect", path).stdout
    for name in [*shown, "groß", "θ"]:
        assert f"params/{name} " in said
    assert said.startswith(f"{tmp_path}/c\\x1b[31m_1\n") and RED not in said
    said = command("inspect", path, charset="ascii").stdout
    for name in [*shown, "gro\\xdf", "\\u03b8"]:
        assert f"params/{name} " in said
    said = command("inspect", path, "--json", charset="ascii").stdout
    assert {f"params/{name}" for name in names} <= {
        leaf["name"] for leaf in json.loads(said)["leaves"]
    }
    assert RED not in said
    for arguments in (
        ("inspect", path, "--at", RED),
        ("inspect", tmp_path / f"{RED}\n"),
        ("export", path, "--weights", RED, "--safetensors", tmp_path / "out"),
        ("profile", RED),
        (RED,),
        (f"--{RED}",),
    ):
        said = command(*arguments).stderr
        assert RED not in said and "\\x1b[31m" in said and said.count("\n") == 1


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "arguments", [("profile", "power:0.1"), ("profile", "--help"), ("profile", "nix:1")]
)
def test_a_plain_terminal_gets_our_words_in_its_letters(arguments, charset):
    result = command(*arguments, charset=charset)
    assert result.exit_code == (2 if "nix:1" in arguments else 0)
    said = result.stdout + result.stderr
    words = {"power:0.1": "of theta_0 |", "--help": "1/Sigmaw", "nix:1": "power:\\u03c3_"}
    assert words[arguments[1]] in said


@pytest.mark.slow
@pytest.mark.parametrize("columns", [12, 30])
def test_a_narrow_terminal_shows_every_number(run, columns):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb"}
    with process("inspect", run / "2", stdout=theirs, env=environment) as running:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                said += part
        assert running.wait() == 0
    assert "│ float32 │   8192 │ 32.0 KiB │" in said.decode()


WRONG = {
    "--dtype": ("average", "run", "--out", "o", "--dtype", "int8"),
    "--dtype of no kind": ("export", "run", "--out", "o", "--dtype", "nix"),
    "--profile": ("average", "run", "--out", "o", "--profile", "ema:2"),
    "--steps": ("average", "run", "--out", "o", "--steps", "1,-2"),
    "--steps of demo": ("demo", "--steps", "19"),
    "--steps of profile": ("profile", "0.9", "--steps", "0"),
    "--out": ("demo", "--out", "gs://bucket/demo"),
    "--every": ("synthesize", "run", "--target", "0.9", "--out", "o", "--every", "0"),
    "--start": ("synthesize", "run", "--target", "0.9", "--out", "o", "--start", "-1"),
    "--step": ("synthesize", "run", "--target", "0.9", "--out", "o", "--step", "x"),
    "--sigma-rel": ("synthesize", "run", "--sigma-rel", "0.4", "--out", "o"),
    "--target": ("synthesize", "run", "--target", "nix", "--out", "o"),
    "--recorded": ("synthesize", "run", "--out", "o", "--recorded", "a=nix"),
    "--nix": ("inspect", "run", "--nix"),
    "path": ("inspect", ""),
    "paths": ("average", "run", "", "--out", "o"),
    "directory": ("synthesize", "", "--target", "0.9", "--out", "o"),
    "--out of average": ("average", "run", "--out", ""),
    "--out of export": ("export", "run", "--out", "."),
    "--out of demo": ("demo", "--out", __file__),
    "--plot": ("profile", "0.9", "--plot", "w.txt"),
    "--plot of nothing": ("profile", "0.9", "--plot", ""),
    "DECAY": ("profile", "0.9", "cosine"),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_value_is_one_line_that_names_its_option(option):
    result = command(*WRONG[option])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"emaopt {WRONG[option][0]}: ")
    name = {"--out of export": "--safetensors"}.get(option, option.split()[0])
    assert name in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("writer", [*WRITERS, "inspect"])
def test_json_is_one_document_and_nothing_else(run, writer, tmp_path):
    out = tmp_path / "out"
    arguments = {**writers(run, out), "inspect": ("inspect", run / "1")}[writer]
    result = command(*arguments, "--json")
    found = json.loads(result.stdout)
    keys = {
        "average": {"record", "written"},
        "synthesize": {"record", "written"},
        "export": {"weights", "best", "written"},
        "profile": {"steps", "averages", "written"},
        "inspect": set(checkpoint.Description._fields),
    }[writer.split()[0]]
    assert found.keys() == keys and result.exit_code == 0
    if "written" in keys:
        assert found["written"] == str(out) and out.exists()
    if "record" in keys and "written" in keys:
        assert found["record"] == checkpoint.describe(out).record
    if "averages" in keys:
        names = {"mean_age", "effective_iterates", "initial_weight", "half_life"}
        summaries = [one["summary"] for one in found["averages"]]
        assert all(one is None or one.keys() == names for one in summaries)


def test_an_error_leaves_the_output_of_json_empty(tmp_path):
    result = command("inspect", tmp_path / "nothing", "--json")
    assert (result.exit_code, result.stdout) == (1, "")


def test_version_is_told_with_those_of_what_it_stands_on():
    first, second = command("--version").stdout.splitlines()
    assert re.fullmatch(r"emaopt \d+\.\d+\.\d+", first)
    assert re.match(r"jax \S+, optax \S+, orbax-checkpoint \S+, Python 3", second)


@pytest.mark.parametrize(
    "words, completed",
    [("emaopt insp", "inspect"), ("emaopt average run --pr", "--profile")],
)
def test_the_shell_completes_commands_and_options(words, completed):
    said = command(
        _EMAOPT_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    ).stdout
    assert completed in said.split()


def kinds_of_paths(path, directory, monkeypatch):
    monkeypatch.chdir(path.parent)
    (directory / "link").symlink_to(path)
    return [path, path.name, f"{path}/", f"../{path.parent.name}/2", directory / "link"]


@pytest.mark.parametrize("name", ["inspect", "average", "export"])
def test_every_command_takes_every_kind_of_path(run, name, tmp_path, monkeypatch):
    kinds = kinds_of_paths(run / "2", tmp_path, monkeypatch)
    for number, path in enumerate(kinds):
        out = () if name == "inspect" else ("--out", tmp_path / str(number))
        assert command(name, path, *out).exit_code == 0, path
    for path, says in (("gs:/x", "no checkpoint at"), ("nix://x", "no kind of URL")):
        out = () if name == "inspect" else ("--out", tmp_path / "out")
        result = command(name, path, *out)
        assert result.exit_code == 1 and says in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_file_is_written_to_a_url_whole_or_not_at_all(run, monkeypatch):
    store, url = MemoryFileSystem(), "s3://bucket/model"
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: store)
    assert command("export", run / "2", "--out", url).exit_code == 0
    assert load(store.store[url].getvalue()).keys() == {"a", "b"}
    refused = command("export", run / "2", "--out", url)
    assert refused.exit_code == 1 and "exists; --force replaces it" in refused.stderr
    monkeypatch.setattr(np, "ascontiguousarray", lambda array: 1 / 0)
    assert command("export", run / "2", "--out", url, "--force").exception
    assert list(store.store) == [url]
