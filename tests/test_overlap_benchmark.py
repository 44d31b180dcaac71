"""benchmarks/overlap.py in a tiny setting: what it computes, not what it finds."""

import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def overlap(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("overlap")


def test_model_is_compute_plus_what_the_delay_cannot_hide(overlap):
    job = overlap.Job(4e9, 1.25e9, 30, 0.5, 8)
    assert math.isclose(job.communication, 2 * 7 / 8 * 3.2)
    assert math.isclose(job.round(), 15 + 5.6)
    assert math.isclose(job.round(3), 15 + 4.1)
    assert job.round(30) == 15
    assert math.isclose(job.saved(30), 5.6 / 20.6)
    assert job.hiding == 12
    slow = job._replace(bandwidth=1.25e8)
    assert math.isclose(slow.round(30), 56)  # all of it communication
    assert slow.hiding == 112
    assert overlap.Job(1.0, 1.0, 3, 0.1, 2).hiding == 10


def test_model_prints_a_markdown_table(overlap):
    _, _, header, rule, *rows = overlap.model(1e9, 8, 0.5)
    assert len(rows) == 12
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    assert set(rule) == set("|- ")
    (row,) = (row for row in rows if row.split()[1:6:2] == ["10", "float32", "30"])
    assert "| 27.2%" in row


def test_quality_lands_what_is_in_flight_when_it_synchronizes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality = importlib.import_module("overlap_quality")
    quality.load()

    case = quality.Case(delay=1, mix="carry")
    start = quality.start(range(2), period=1, rounds=2)
    assert start.batches.shape == (2, 2, 1, quality.WORKERS, quality.BATCH)
    late, landed = quality.train(start, 3e-3, 0.2, case=case)
    assert np.all(np.asarray(landed.loss) < np.asarray(late.loss))  # it lacks a round
    assert late.loss[0] != late.loss[1]


def test_programs_of_time_do_what_their_names_say(overlap, monkeypatch):
    monkeypatch.setattr(overlap, "LAYERS", 1)
    rivals = overlap.rivals(overlap.make_mesh(2), 8, 2)
    for rival in rivals.values():
        rival.run()
        rival.run()

    def apart(params):
        return max(float(jnp.abs(leaf[0] - leaf[1]).max()) for leaf in params)

    params = {
        name: rival.carry[0] if name == "all-reduce" else rival.carry[0][0]
        for name, rival in rivals.items()
    }
    assert apart(params["delay 0"]) == 0 == apart(params["all-reduce"])
    assert apart(params["no exchange"]) > 0 < apart(params["delay 2"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        params["no exchange"],
        params["unrelated"],
    )


def test_hidden_is_a_share_of_the_all_reduce(overlap):
    found = {"no exchange": [2.0], "all-reduce": [1.0], "unrelated": [3.0]}
    found |= {"delay 0": [3.0], "delay 8": [2.5]}
    rows = {name: rest for name, *rest in overlap.compared(found)}
    assert rows["delay 8"][2].startswith("50%")
    assert rows["unrelated"][2].startswith("0%")
    assert rows["delay 0"][2] == rows["no exchange"][2] == ""
