"""The house as CONTRIBUTING and README describe it."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emaopt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = {
    ".".join(path.relative_to(ROOT / "emaopt").with_suffix("").parts): path
    for path in (ROOT / "emaopt").rglob("*.py")
}


def test_core_needs_neither_orbax_nor_flax_nor_matplotlib():
    program = (
        "import sys, emaopt; print(*({m.partition('.')[0] for m in sys.modules}"
        " & {'orbax', 'flax', 'matplotlib', 'chex', 'sklearn', 'rich', 'typer'}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "\n"), run.stderr


@pytest.mark.slow
def test_import_costs_little_over_optax():
    program = (
        "import time; t = time.perf_counter(); import optax; u = time.perf_counter(); "
        "import emaopt; print((time.perf_counter() - u) / (u - t))"
    )
    command = [sys.executable, "-c", program]
    shares = [float(subprocess.check_output(command)) for _ in range(3)]
    assert min(shares) <= 0.25  # where Python may write no bytecode, too


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_readme_example_runs_and_has_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, *others = python_blocks()
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 14  # ten of the user's own, four of imports
    scope = {}
    for block in (example, *others):
        exec(compile(block, "README.md", "exec"), scope)


def test_readme_commands_are_two_lines_that_ci_runs():
    for name in ("demo", "tests"):
        block = re.search(
            rf"<!-- {name} -->\n```sh\n(.*?)```\n<!-- end -->", README, re.S
        )
        assert block and len(block[1].splitlines()) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_names_what_exists():
    for name in re.findall(r"`emaopt\.([a-z_\d]+)`", README):
        assert hasattr(emaopt, name) or {name, f"{name}.__init__"} & set(MODULES), name


def test_no_registry_and_no_private_path_is_named():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    for file in files:
        if file.endswith(
            (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".ipynb", "run")
        ):
            text = (ROOT / file).read_text()
            assert not re.search(r"index[-_]url\s*=|/(work|root)/", text), file


def test_types_have_names():
    """`Any` is for what really is anything: trees are `PyTree`, and so on."""
    lines = [line for path in MODULES.values() for line in path.read_text().splitlines()]
    assert sum(len(re.findall(r"\bAny\b", line)) for line in lines) <= len(lines) / 40


LATE = {
    "batch_stats",
    "checkpoint",
    "elastic",
    "plots",
    "posthoc",
    "tf1",
}  # imported when first used


@pytest.mark.quick(1000)
@pytest.mark.parametrize("name", ["", "cli", "demo", "digits", *sorted(LATE)])
def test_public_modules_say_what_they_offer(name):
    module = importlib.import_module(f"emaopt.{name}".rstrip("."))
    for public in module.__all__:
        assert not public.startswith("_")
        assert getattr(module, public) is not None
    assert set(module.__all__) <= set(dir(module))


def test_dir_shows_what_is_offered_and_nothing_else():
    shown = {name for name in dir(emaopt) if not name.startswith("_")}
    assert shown == set(emaopt.__all__) | LATE
    assert emaopt.__version__ == importlib.metadata.version("emaopt")
    assert not hasattr(emaopt, "importlib")
    with pytest.raises(AttributeError, match="'emaopt' has no attribute 'minimize'"):
        emaopt.minimize  # noqa: B018


MODULES_OF_USERS = (
    "emaopt",
    "emaopt.checkpoint",
    "emaopt.posthoc",
    "emaopt.elastic",
    "emaopt.batch_stats",
    "emaopt.plots",
    "emaopt.tf1",
    "emaopt.digits",
    "emaopt.demo",
)


def test_the_reference_has_one_entry_for_every_public_name():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    entries = [
        entry
        for page in pages
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
        if entry not in MODULES_OF_USERS
    ]
    names = [
        f"{module}.{name}"
        for module in MODULES_OF_USERS
        for name in importlib.import_module(module).__all__
    ]
    assert sorted(entries) == sorted(names)
