"""Whose step a directory is, is not guessed, nor is one that cannot be read left out."""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from emaopt import checkpoint


@pytest.fixture
def run(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (100, 300):
            params = {"w": jnp.full(1, float(step))}
            checkpointer.save(tmp_path / str(step), {"params": params})
    return tmp_path


def make(run, out):
    return checkpoint.average([run], out)


def synthesized(run, out):
    return checkpoint.synthesize(run, out, target="power:0.1")


@pytest.mark.parametrize("call", [make, synthesized])
@pytest.mark.parametrize("name", ["mean_300", "0300", "a-300"])
def test_two_directories_of_one_step_are_named(call, name, run):
    checkpoint.average([run / "100"], run / name)
    with pytest.raises(ValueError, match="both of step 300") as raised:
        call(run, run / "out")
    assert {str(run / "300"), str(run / name)} <= set(str(raised.value).split())


@pytest.mark.parametrize("call", [make, synthesized])
def test_a_directory_that_one_may_not_enter_is_named(call, run, monkeypatch):
    def access(path, mode, **options):  # root may enter any
        del mode, options
        return Path(path).name != "300"

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(PermissionError, match=re.escape(f"{run / '300'} may not be")):
        call(run, run / "out")
