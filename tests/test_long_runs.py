"""Profiles of runs whose steps are so many that no array of them can be made."""

import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

from emaopt import _profiles, checkpoint, cli, plots

PROFILES = ["ema:0.9", "ema:0.9999", "half-life:500", "power:0.1", "polynomial:3"]
PROFILES += ["warmup:0.999", "linear", "cosine", "1-sqrt", "linear:0.2", "1-sqrt:0.9"]
STEPS = [(100, 200, 400), (1, 5, 90_000), (0, 50_000, 60_000), (99_998, 99_999, 100_000)]
STEPS += [(100_000,), (5000, 5001, 7777, 100_000)]


@pytest.mark.quick(12)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("profile", PROFILES)
def test_checkpoints_weigh_what_they_do_by_the_array_of_all_steps(
    profile, steps, monkeypatch
):
    by_array = _profiles.merge_weights(profile, len(steps), steps)
    monkeypatch.setattr(_profiles, "LONG", 0)
    found = _profiles.merge_weights(profile, len(steps), steps)
    np.testing.assert_allclose(found, by_array, atol=2e-8)  # warmup's float32


@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("profile", PROFILES)
def test_steps_may_be_unix_times(profile, unit):
    steps = [unit * (1_700_000_000 + k) for k in (0, 100, 200)]
    began = time.perf_counter()
    found = _profiles.merge_weights(profile, 3, steps)
    assert time.perf_counter() - began < 5
    assert np.isclose(found.sum(), 1) and (found >= 0).all()
    if profile == "linear":  # 1 - x over the span: half of it within the last half
        np.testing.assert_allclose(found, [0.25, 0.5, 0.25], rtol=1e-6)
    if profile == "half-life:500" and unit == 1:
        before = 0.5 ** (np.arange(200) / 500) * (1 - 0.5 ** (1 / 500))  # by age
        share = np.interp(np.arange(200), [0, 100], [1, 0])
        np.testing.assert_allclose(found[2], before @ share, rtol=1e-6)


@pytest.mark.slow
def test_a_run_that_is_numbered_by_the_time_is_averaged(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (0, 100, 200):
            path = tmp_path / "run" / str(1_700_000_000_000 + step)
            checkpointer.save(path, {"params": {"w": np.full(2, float(step))}})
    checkpoint.average([tmp_path / "run"], tmp_path / "out", profile="linear")
    with ocp.StandardCheckpointer() as checkpointer:
        mean = checkpointer.restore(tmp_path / "out")["params"]["w"]
    np.testing.assert_allclose(mean, [100, 100], rtol=1e-4)


@pytest.mark.slow
def test_a_profile_of_2_billion_steps_is_summed_up_and_drawn(tmp_path):
    png, steps = tmp_path / "weights.png", str(2**31 - 1)
    arguments = ["profile", "power:0.1", "linear:0.2", "--steps", steps]
    began = time.perf_counter()
    result = CliRunner().invoke(cli.app, [*arguments, "--plot", str(png)])
    assert result.exit_code == 0 and png.read_bytes()[:4] == b"\x89PNG"
    assert time.perf_counter() - began < 20


def test_a_long_run_is_drawn_by_some_of_its_steps(monkeypatch):
    _, weights = _profiles.curve_of("power:0.1", 30_000)
    monkeypatch.setattr(_profiles, "LONG", 100)
    drawn, some = _profiles.curve_of("power:0.1", 30_000)
    assert len(drawn) < 5000 and drawn[0] == 1 and drawn[-1] == 30_000
    np.testing.assert_allclose(some, weights[drawn.astype(int)], rtol=1e-6, atol=1e-30)
    axes = plots.weight_curves(plots.new_axes(), {"x": (drawn, some)})
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), drawn)
