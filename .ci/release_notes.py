"""Prints what CHANGELOG.md says of a version, if its tag can be released.

    python .ci/release_notes.py v1.2.3

The version is that of pyproject.toml and CITATION.cff, its section in CHANGELOG.md says
what is new and has the date of the release, as CITATION.cff has it, and checkpoints of it
are in tests/data/released. Otherwise it says what is missing, with status 1. Python's
standard library is enough.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    """The section of a tag's version; SystemExit if something says otherwise."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SystemExit(f"pyproject.toml: version {version} is not of the form 1.2.3")
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, and pyproject.toml has version {version}")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    head = rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)\n"
    end = r"(?=^## |^\[[^]\n]+\]: |\Z)"  # the next version, links of the whole page
    section = re.search(f"{head}(.*?){end}", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'")
    date, text = section[1], section[2].strip()
    if not text:
        raise SystemExit(f"CHANGELOG.md says nothing of {version}")
    citation = (ROOT / "CITATION.cff").read_text()
    for field, value in (("version", version), ("date-released", date)):
        if not re.search(rf'^{field}: "?{re.escape(value)}"?$', citation, re.MULTILINE):
            raise SystemExit(f"CITATION.cff does not say '{field}: {value}'")
    if not (ROOT / "tests/data/released" / version.rpartition(".")[0]).is_dir():
        raise SystemExit(f"tests/data/released has no checkpoints of {version}")
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python .ci/release_notes.py v1.2.3")
    print(notes(sys.argv[1]))
