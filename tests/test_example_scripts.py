"""Each program of examples/, in a small setting; two more are in `test_examples`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ALONE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
OTHERS = {"elastic_diloco.py", "serve.py"}  # tested elsewhere
LAST = {  # options of a small setting, and what the last line says
    "linen_batchnorm.py": (["--steps=80"], r"loaded (\S+), by Orbax alone \1: the same"),
    "nnx_dropout.py": (["--steps=20"], r"resumed: all 24 arrays are the same, bit for"),
    "equinox_mlp.py": (["--steps=40"], r"the restored state is the saved one$"),
    "fsdp.py": (["--steps=20"], r"on all devices (\S+), served on one \1$"),
    "diffusion_posthoc.py": (
        ["--steps=640"],
        r"by more than chance(: power:0\.\d+, by Orbax alone 0\.\d+)?$",
    ),
    "teacher_student.py": (["--steps=40"], r"served from a checkpoint: \d\d\.\d%$"),
    "target_network.py": (["--steps=4000"], r"checkpoint: 16 steps, of 16 that are"),
    "gan.py": (["--steps=120"], r"from the checkpoint of both: distance \d\.\d+$"),
    "diloco.py": (["--steps=50"], r"the center, served from a checkpoint +loss \d\.\d"),
}


def test_every_program_is_tested_and_listed():
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == {*LAST, *OTHERS}
    listed = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", listed, re.M)) == programs


@pytest.mark.slow
@pytest.mark.parametrize("program", LAST)
def test_what_its_last_line_says(program):
    options, last = LAST[program]
    run = subprocess.run(
        [sys.executable, EXAMPLES / program, *options],
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(last, run.stdout.splitlines()[-1]), run.stdout
    assert "emaopt" not in run.stderr, run.stderr
