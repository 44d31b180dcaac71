"""The house as CONTRIBUTING and README describe it."""

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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
    # Time of this process alone: others may keep the machine busy.
    program = (
        "from time import process_time as now; t = now(); import optax; u = now(); "
        "import emaopt; print((now() - u) / (u - t))"
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


def texts():
    """The text files of the repository by name; an unpacked sdist holds no others."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not (ROOT / ".git").exists():
        paths = (path for path in ROOT.rglob("*") if path.is_file())
        listed = [str(path.relative_to(ROOT)) for path in paths]
    ends = (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".ipynb", ".cff")
    files = [f for f in listed if f.endswith(ends) or f.startswith(".ci/")]
    return {file: (ROOT / file).read_text() for file in files if (ROOT / file).exists()}


def test_no_registry_and_no_private_path_is_named():
    found = texts()
    assert {"README.md", ".ci/run", ".github/workflows/ci.yml"} <= found.keys()
    for file, text in found.items():
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


# What is released, and what it promises.

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = {
    path.name: yaml.load(path.read_text(), yaml.BaseLoader)  # "on" is no boolean
    for path in (ROOT / ".github" / "workflows").iterdir()
}


def test_the_version_is_the_same_everywhere():
    assert emaopt.__version__ == PROJECT["version"] == CITATION["version"]


def test_the_changelog_has_a_place_for_what_is_new():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    for head in heads[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head), head


def test_the_citation_is_complete():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["message"] and CITATION["title"].startswith("emaopt")
    assert CITATION["repository-code"] == PROJECT["urls"]["Source"]
    assert CITATION["url"] == PROJECT["urls"]["Documentation"]


def test_every_address_of_the_project_is_one_of_two():
    allowed = re.compile(
        r"https://(github\.com/emaopt/emaopt|raw\.githubusercontent\.com/emaopt/emaopt/main"
        r"|emaopt\.github\.io/emaopt|pypi\.org/project/emaopt)(/|$)"
    )
    found = {
        (file, url.rstrip(".,:;`"))
        for file, text in texts().items()
        if not file.startswith("tests/")
        for url in re.findall(r"https?://[^\s)\]}>\"'\\]+", text)
        if "emaopt" in url
    }
    assert {file for file, _ in found} >= {"pyproject.toml", "CITATION.cff"}
    assert [(f, url) for f, url in sorted(found) if not allowed.match(url)] == []
    for name in ("Homepage", "Documentation", "Source", "Issues", "Changelog"):
        assert allowed.match(PROJECT["urls"][name])


def test_an_address_of_a_file_leads_to_one():
    base = f"{PROJECT['urls']['Source']}/(?:blob|tree)/main/"
    base = rf"(?:{base}|https://raw\.githubusercontent\.com/emaopt/emaopt/main/)"
    found = {
        (file, path)
        for file, text in texts().items()
        for path in re.findall(rf"{base}([\w./-]*\w)", text)
    }
    assert ("pyproject.toml", "CHANGELOG.md") in found
    assert [(file, path) for file, path in found if not (ROOT / path).exists()] == []


@pytest.mark.quick(100)
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_pins_majors_ends_and_may_do_little(name):
    workflow = WORKFLOWS[name]
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).exists()
            continue
        assert int(job["timeout-minutes"]) <= 60 and job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            action, _, version = step.get("uses", "own@v0").partition("@")
            assert re.fullmatch(r"v\d+|release/v\d+", version), action
            for script in re.findall(r"\.ci/\w+(?:\.py)?", step.get("run", "")):
                assert (ROOT / script).exists()


def test_nothing_is_published_before_ci_and_the_tests_of_the_package_have_passed():
    jobs = WORKFLOWS["release.yml"]["jobs"]

    def before(name):
        needs = jobs[name].get("needs", [])
        needs = [needs] if isinstance(needs, str) else needs
        return {*needs}.union(*map(before, needs))

    writing = {name for name, job in jobs.items() if "permissions" in job}
    assert writing == {"publish", "release", "docs"}
    for name in writing:
        assert before(name) >= {"ci", "build", "test"}
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in WORKFLOWS["ci.yml"]["on"]


def test_what_is_said_to_be_supported_is_what_ci_runs():
    classifiers = PROJECT["classifiers"]
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE)
    matrix = WORKFLOWS["ci.yml"]["jobs"]["run"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in matrix if row["versions"] == "newest"} == {*named}
    assert PROJECT["requires-python"] == f">={named[0]}"
    (oldest,) = (row for row in matrix if row["versions"] == "oldest")
    assert (oldest["python"], oldest["constraint"]) == (named[0], ".ci/oldest.txt")
    systems = {name for name in classifiers if name.startswith("Operating System")}
    assert systems == {"Operating System :: POSIX :: Linux"}  # of all jobs

    # The page on stability, with the first and the last version of each.
    page = (ROOT / "docs" / "stability.md").read_text()
    table = dict(re.findall(r"^\| (\S+) \| (\d[\d.]* \| \S.*) \|$", page, re.MULTILINE))
    assert table.pop("Python") == f"{named[0]} | {named[-1]}"
    pins = dict(
        line.split("==") for line in (ROOT / ".ci" / "oldest.txt").read_text().split()
    )
    assert pins.pop("jaxlib") == pins["jax"]
    assert table == {name: f"{version} | the newest" for name, version in pins.items()}
    bounds = dict(d.split(">=") for d in PROJECT["dependencies"])
    for name, version in pins.items():
        assert version.removesuffix(".0") == bounds[name].removesuffix(".0")


def test_imports_raise_no_warning():
    program = "import emaopt; [getattr(emaopt, name) for name in dir(emaopt)]"
    command = [sys.executable, "-W", "error", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# The scripts of a release.


@pytest.fixture
def release(tmp_path):
    """A copy of what a release reads, with 1.2.3 about to be released, and its check."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release_notes.py", tmp_path / ".ci")
    (tmp_path / "tests/data/released/1.2").mkdir(parents=True)
    for name, text in {
        "pyproject.toml": '[project]\nversion = "1.2.3"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\ndate-released: 2030-01-02\n",
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2030-01-02\n\n"
        "### Added\n\n- `new`.\n\n## [1.2.30] - 2029-01-01\n\n- Old.\n",
    }.items():
        (tmp_path / name).write_text(text)

    def notes(tag="v1.2.3"):
        command = [sys.executable, tmp_path / ".ci" / "release_notes.py", tag]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.returncode, run.stdout or run.stderr

    return tmp_path, notes


def test_notes_of_a_release_are_its_section(release):
    directory, notes = release
    assert notes() == (0, "### Added\n\n- `new`.\n")
    with (directory / "CHANGELOG.md").open("w") as file:  # the last one, above links
        file.write("## [1.2.3] - 2030-01-02\n\n- New.\n\n[1.2.3]: https://x\n")
    assert notes() == (0, "- New.\n")


@pytest.mark.quick(100)
@pytest.mark.parametrize(
    "file, old, new, says",
    [
        ("pyproject.toml", "1.2.3", "1.2.4", "the tag is v1.2.3, and"),
        ("pyproject.toml", "1.2.3", "1.2.3rc1", "1.2.3rc1 is not of the form"),
        ("CHANGELOG.md", "[1.2.3]", "[1.2.2]", "no section '## [1.2.3]"),
        ("CHANGELOG.md", "[1.2.3] - 2030-01-02", "[1.2.3]", "no section '## [1.2.3]"),
        ("CHANGELOG.md", "### Added\n\n- `new`.", "", "says nothing of 1.2.3"),
        (
            "CHANGELOG.md",
            "2030-01-02",
            "2030-01-03",
            "not say 'date-released: 2030-01-03",
        ),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", "not say 'version: 1.2.3'"),
        ("CITATION.cff", "date-released", "date", "does not say 'date-released: 2030"),
    ],
)
def test_what_keeps_a_tag_from_being_released_is_said(release, file, old, new, says):
    directory, notes = release
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new))
    status, message = notes()
    assert status == 1 and says in message


def test_a_release_has_a_tag_of_its_version_and_checkpoints(release):
    directory, notes = release
    assert notes("1.2.3")[0] == notes("v1.2")[0] == notes("v1.2.30")[0] == 1
    (directory / "tests/data/released/1.2").rmdir()
    assert notes() == (1, "tests/data/released has no checkpoints of 1.2.3\n")


def test_sites_of_versions_stay_and_the_newest_is_at_the_root(tmp_path):
    def git(*arguments):
        command = ["git", *arguments]
        run = subprocess.run(command, cwd=clone, capture_output=True, check=True)
        return run.stdout.decode().strip()

    clone, site = tmp_path / "clone", tmp_path / "site"
    clone.mkdir()
    git("init", "--quiet", "--bare", "../origin")
    git("init", "--quiet")
    git("config", "user.name", "tester")
    git("config", "user.email", "tester")
    git("remote", "add", "origin", "../origin")
    git("commit", "--quiet", "--allow-empty", "--message", "Begin")
    for version in ("0.1.9", "0.2.0", "0.1.10", "0.10.0"):
        site.mkdir()
        (site / "index.html").write_text(version)
        (site / f"of-{version}.html").write_text("")
        git("tag", f"v{version}")
        command = ["bash", ROOT / ".ci" / "pages", site, f"v{version}"]
        subprocess.run(command, cwd=clone, check=True)
        shutil.rmtree(site)
    git("fetch", "--quiet", "origin", "gh-pages")
    names = git("ls-tree", "-r", "--name-only", "FETCH_HEAD").splitlines()
    pages = {name: git("show", f"FETCH_HEAD:{name}") for name in names}
    assert {name: text for name, text in pages.items() if text} == {
        "index.html": "0.10.0",
        "0.1/index.html": "0.1.10",
        "0.2/index.html": "0.2.0",
        "0.10/index.html": "0.10.0",
    }
    assert {name for name, text in pages.items() if not text} == {
        ".nojekyll",
        "of-0.10.0.html",
        "0.1/of-0.1.10.html",
        "0.2/of-0.2.0.html",
        "0.10/of-0.10.0.html",
    }


def test_links_of_readme_to_the_documentation_lead_to_a_page():
    site = "https://emaopt.github.io/emaopt/"
    pages = re.findall(rf"\({site}([a-z\-/]*)\)", README)
    assert len(pages) > 10
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in pages:
        file = f"{page.rstrip('/')}.md" if page else "index.md"
        assert f"{file}\n" in nav, page
        assert (ROOT / "docs" / file).exists() or file.startswith("project/"), page
