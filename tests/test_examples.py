"""The examples, in a small setting, and the programs of the documentation."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from elastic_runs import free_address

ROOT = Path(__file__).parents[1]
ALONE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.mark.slow
def test_elastic_diloco(tmp_path):
    program = ROOT / "examples" / "elastic_diloco.py"
    options = ["--num-workers=3", "--exchanges=14", "--kills=3:2 6:1"]
    run = subprocess.run(
        [sys.executable, program, *options, f"--directory={tmp_path}"],
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    assert [record["number"] for record in records] == list(range(1, 15))
    assert records[0]["live"] == [0, 1, 2] and 2 not in records[4]["live"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]


@pytest.mark.slow
def test_no_request_fails_while_the_server_takes_new_versions():
    program = ROOT / "benchmarks" / "publishing.py"
    run = subprocess.run(
        [sys.executable, program, "--only=serve", "--requests=500", "--versions=3"],
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r" 0 failed, 3 swaps, 1 program compiled;", run.stdout), run.stdout


def blocks(page):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_page_on_elastic_training(tmp_path):
    worker, save, restore = blocks("elastic.md")
    again = worker.replace("    number = 0\n", "")
    again = again.replace("worker=rank", "worker=rank, number=number")
    head, tail = again.split("data = ", 1)
    tail = tail.replace("< 10", "< 12")
    programs = {
        "first": worker + save,
        "again": head + restore + "print(number)\ndata = " + tail,
    }
    found = {}
    for name, program in programs.items():
        run = {"ADDRESS": free_address(), "WORLD_SIZE": "2", "RUN": str(tmp_path)}
        members = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=ALONE | run | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        found[name] = [member.communicate(timeout=100)[0] for member in members]
    first, again = found["first"], found["again"]
    assert first[0] == first[1] and first[0].startswith("10 (0, 1) [")
    assert [p.name for p in tmp_path.iterdir()] == ["10"]
    assert again[0] == again[1] and again[0].startswith("10\n12 (0, 1) [")


# The one on elastic training is several programs.
PAGES = sorted(
    str(path.relative_to(ROOT / "docs"))
    for path in (ROOT / "docs").rglob("*.md")
    if "```python\n" in path.read_text() and path.name != "elastic.md"
)


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_that_are_one_program(tmp_path, monkeypatch, page):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page, "exec"), scope)
