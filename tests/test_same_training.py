"""benchmarks/same_training.py sees a single bit that differs; its trainings are run by hand, as CONTRIBUTING says."""

import importlib.util
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

specification = importlib.util.spec_from_file_location("same_training", REPOSITORY / "benchmarks" / "same_training.py")
assert specification is not None and specification.loader is not None
same_training: Any = importlib.util.module_from_spec(specification)
specification.loader.exec_module(same_training)


def state() -> dict[str, Any]:
    return {"losses": {1: 0.1}, "encoder": {"w": torch.arange(6.0)}, "optimizer": {"state": [{"m": torch.zeros(2)}]}}


def test_the_same_state_is_the_same_even_where_it_is_nan() -> None:
    one, other = state(), state()
    one["encoder"]["w"][2] = other["encoder"]["w"][2] = torch.nan
    assert same_training.differing(one, other) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s["losses"].update({1: 0.1 + 1e-17 * 8}), ".losses.1"),
        (lambda s: s["encoder"]["w"][5].add_(4.8e-7), ".encoder.w"),
        (lambda s: s["encoder"].update(w=s["encoder"]["w"].double()), ".encoder.w"),
        (lambda s: s["optimizer"]["state"][0]["m"][1].neg_(), ".optimizer.state.0.m"),  # -0.0
        (lambda s: s["encoder"].pop("w"), ".encoder.w"),
    ],
)
def test_one_bit_is_named(change: Any, name: str) -> None:
    changed = state()
    change(changed)
    assert same_training.differing(state(), changed) == [name]
    assert same_training.differing(changed, state()) == [name]
