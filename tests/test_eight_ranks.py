"""The simulation of a node (benchmarks/eight_ranks.py): what the plan claims, and the line of limited bandwidth."""

import importlib.util
import sys
import time
from types import ModuleType

import pytest
from conftest import REPOSITORY


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def test_with_lanes_a_multiple_of_the_nodes_each_node_reads_its_part_alone() -> None:
    found = script("eight_ranks").plan(shards=128, per_shard=32, batch_size=512)
    assert found["8"]["read"] == found["64"]["read"] == 1 / 8
    assert found["8"]["fetched"] <= 0.25  # and the first chunk of the next epoch
    assert found["1"]["read"] > 0.8
    assert 1 / 8 < found["12"]["read"] < 1 / 4


def test_connections_share_a_line() -> None:
    line = script("servers").Faults(0, 0, 0, 0, bandwidth=1e6)
    began = time.monotonic()
    for _ in range(4):
        line.pass_line(50_000)
    assert time.monotonic() - began == pytest.approx(0.2, abs=0.1)
