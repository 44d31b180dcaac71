"""The scripts of examples/ that are one program each, in a small setting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Each script brings the devices that it needs itself.
ALONE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
ELSEWHERE = {"elastic_diloco.py", "serve.py"}  # test_examples.py runs these


def printed(script, *options):
    """What a script prints, if it succeeds and emaopt warns of nothing."""
    run = subprocess.run(
        [sys.executable, EXAMPLES / script, *options],
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert "emaopt" not in run.stderr, run.stderr
    return run.stdout


def numbers(pattern, text):
    """The numbers in the one place of the text that the pattern tells."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def best_average_is_served(text):
    (measured,) = numbers(r"best: step 120, average, measured ([\d.]+)", text)
    (raw,) = numbers(r"step 120: raw/loss ([\d.]+)", text)
    loaded, orbax = numbers(r"loaded ([\d.]+), by Orbax alone ([\d.]+)", text)
    assert measured == loaded == orbax < raw


def resumes_bit_for_bit(text):
    (number,) = numbers(r"resumed: all (\d+) arrays are the same, bit for bit", text)
    assert number > 4 * 4  # weights and biases, two moments of Adam's, the average
    (middle,) = numbers(r"step 50, average: held-out loss ([\d.]+)", text)
    (end,) = numbers(r"step 100, average: held-out loss ([\d.]+)", text)
    assert end < middle < 1


def averaged_model_is_served(text):
    raw, averaged = numbers(r"raw ([\d.]+), averaged ([\d.]+)", text)
    (served,) = numbers(r"served ([\d.]+)", text)
    assert served == averaged < raw


def an_eighth_is_held(text):
    assert re.findall(r"([\d.]+)% of the ([\w' ]+)", text) == [
        ("12.5", "parameters"),
        ("12.5", "average"),
        ("12.5", "optimizer's state"),
    ]
    on_all, on_one = numbers(r"on all devices ([\d.]+), served on one ([\d.]+)", text)
    assert on_all == pytest.approx(on_one, abs=2e-4) and on_all < 1


def an_average_is_chosen(text):
    rows = dict(re.findall(r"^(raw|power:[\d.]+) +([\d.]+)", text, re.MULTILINE))
    losses = {name: float(loss) for name, loss in rows.items()}
    assert len(losses) == 8
    ((chosen, loss),) = re.findall(r"chance: (power:[\d.]+), by Orbax .* ([\d.]+)", text)
    assert float(loss) == losses[chosen] < losses["raw"]


def the_teacher_helps(text):
    alone, _ = numbers(r"labels only +([\d.]+)%, its average ([\d.]+)%", text)
    _, teacher = numbers(r"mean teacher +([\d.]+)%, the teacher +([\d.]+)%", text)
    assert alone + 3 < teacher
    assert numbers(r"served from a checkpoint: ([\d.]+)%", text) == [teacher]


def the_goal_is_found(text):
    assert numbers(r"before learning: (\d+)", text) == [50]
    assert numbers(r"checkpoint: (\d+) steps, of (\d+) that are needed", text) == [16, 16]


def exchanges_are_saved(text):
    (before,) = numbers(r"before training +loss ([\d.]+)", text)
    often, _, synchronous = numbers(
        r"synchronous +(\d+) exchanges, (\d+) kB +loss ([\d.]+)", text
    )
    seldom, _, center = numbers(r"DiLoCo +(\d+) exchanges, (\d+) kB +loss ([\d.]+)", text)
    assert (often, seldom) == (100, 4)
    assert max(synchronous, center) < before / 4
    assert numbers(r"checkpoint +loss ([\d.]+)", text) == [center]


def the_generator_is_served(text):
    steps = re.findall(r"distance ([\d.]+), of the average ([\d.]+)", text)
    assert len(steps) == 6
    last = steps[-1][1]
    assert float(last) < float(steps[0][1]) / 2
    assert re.search(rf"checkpoint of both: distance {last}$", text, re.MULTILINE)


SLOW = {
    "linen_batchnorm.py": (["--steps=120"], best_average_is_served),
    "fsdp.py": (["--steps=100"], an_eighth_is_held),
    "diffusion_posthoc.py": (["--steps=1600"], an_average_is_chosen),
    "teacher_student.py": (["--steps=2000"], the_teacher_helps),
    "target_network.py": (["--steps=6000"], the_goal_is_found),
    "diloco.py": (["--steps=100"], exchanges_are_saved),
    "gan.py": (["--steps=1200"], the_generator_is_served),
}
QUICK = {
    "nnx_dropout.py": (["--steps=100"], resumes_bit_for_bit),
    "equinox_mlp.py": (["--steps=100"], averaged_model_is_served),
}


@pytest.mark.parametrize("script", QUICK)
def test_a_quick_example_shows_what_it_says(script):
    options, shows = QUICK[script]
    shows(printed(script, *options))


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW)
def test_an_example_shows_what_it_says(script):
    options, shows = SLOW[script]
    shows(printed(script, *options))


@pytest.mark.slow
def test_diloco_has_the_same_numbers_on_four_devices(monkeypatch):
    one = printed("diloco.py", "--steps=50")
    flags = "--xla_force_host_platform_device_count=4"
    monkeypatch.setitem(ALONE, "XLA_FLAGS", flags)
    assert printed("diloco.py", "--steps=50") == one


def test_every_example_is_run_and_in_the_table():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*QUICK, *SLOW, *ELSEWHERE}
    table = (EXAMPLES / "README.md").read_text()
    linked = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\)", table, re.MULTILINE)
    assert {name for name, _ in linked} == scripts
    assert all(name == path for name, path in linked)
    for name in scripts:  # a docstring says how it is run
        assert f"python examples/{name}" in (EXAMPLES / name).read_text()
