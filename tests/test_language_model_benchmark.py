"""benchmarks/language_model.py in a tiny setting: what it computes, not what it finds."""

import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("language_model")


@pytest.fixture
def transformer(bench):
    return importlib.import_module("transformer")


def test_text_is_parted_without_a_gap(transformer):
    text = transformer.load(16)
    whole = np.append(text.validation[:, :-1], text.validation[-1, -1])
    size = len(text.training) + len(whole)
    assert size - 16 <= len(text.training) / 0.9 <= size + 17
    np.testing.assert_array_equal(text.validation[1:, 0], text.validation[:-1, -1])
    assert text.training.max() < text.vocabulary > text.validation.max()


def test_model_sees_no_later_byte(transformer):
    shape = {"layers": 1, "width": 16, "context": 16}
    params = transformer.init_params(np.random.default_rng(0), 10, **shape)
    inputs = np.arange(16)[None] % 10
    later = inputs.copy()
    later[0, 8:] = 0
    one, other = (transformer.apply(params, x, 2)[0] for x in (inputs, later))
    np.testing.assert_allclose(one[:8], other[:8], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(one[8:] - other[8:]).max()) > 0.01


def test_rates_are_warmed_up_alike_and_fall_to_0(bench):
    flat, falling = bench.constant(0.5, 200), bench.cosine(0.5, 200)
    for count in (0, 4, 9):
        assert math.isclose(flat(count), 0.5 * (count + 1) / 10, rel_tol=1e-6)
        assert math.isclose(falling(count), flat(count), rel_tol=1e-6)
    assert flat(199) == 0.5
    assert math.isclose(falling(105), 0.25, rel_tol=1e-6)
    assert falling(199) < 1e-4


def test_tuning_goes_on_while_the_best_rate_is_at_an_edge(bench):
    def distance(target):
        return lambda rate: abs(math.log2(rate / target))

    least, *_, most = bench.RATES
    assert set(bench.tune(distance(4 * most))) == {
        *bench.RATES,
        *(most * factor for factor in (2, 4, 8)),
    }
    assert min(bench.tune(distance(least))) == least / 2
    assert tuple(bench.tune(distance(2 * least))) == bench.RATES
    assert len(bench.tune(lambda rate: math.inf)) == bench.MOST_RATES


def test_steps_are_read_between_measurements(bench):
    curve = np.array([4.0, 3.0, 2.0, 3.0])
    assert bench.reached(curve, 2.5, True) == 0.625
    assert bench.reached(curve, 3.0, True) == 0.5
    assert bench.reached(curve, 1.0, True) == math.inf
    assert bench.reached(curve, 2.5, False) == math.inf
    assert bench.reached(curve, 3.0, False) == 1.0
    assert bench.parts([0.5, math.inf]) == "0.50 ± 0.00 (1 of 2 seeds)"
    assert bench.parts([math.inf]) == "never"


def test_every_method_learns_and_serves(bench):
    for name, method in bench.methods(0.1, 0.9).items():
        tx = method.make(0.1, 20)
        params = {"w": jnp.full(2, 3.0)}
        state = tx.init(params)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(20):
            params, state = step(params, state)
        served = emaopt.get_average(state, params) if method.averages else params
        assert np.all(np.abs(served["w"]) < 2.9), name


def test_quick_run_prints_its_tables_and_writes_its_curves(bench, tmp_path, capsys):
    file = tmp_path / "curves.json"
    bench.main(["--quick", "--methods", "EMA", "--json", str(file)])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    names = [row[1].strip() for row in rows if len(row) > 1]
    assert names == 2 * ["method", names[1], "cosine", "EMA"]

    found = json.loads(file.read_text())
    assert found["marks"] == [5, 10, 15, 20]
    baseline, ema = (found["methods"][name] for name in ("cosine", "EMA"))
    assert baseline["final"] == baseline["final_raw"] != ema["final"] != ema["final_raw"]
    assert np.shape(ema["served"]) == (2, 4) == np.shape(ema["training"])
    assert ema["served"][0] != ema["served"][1]
    again = bench.train(
        bench.start(1, bench.QUICK),
        ema["rate"],
        method=bench.methods(0.1, 0.9967)["EMA"],
        size=bench.QUICK,
    )
    assert float(again.final) == ema["final"][1]
