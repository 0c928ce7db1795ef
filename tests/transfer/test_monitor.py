"""The kNN monitor leaves a training encoder as it found it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.sources.opening import open_source
from trainer.joining import Ranks
from transfer.load import CentralCrops, load_encoder
from transfer.monitor import measure, spread_ranges, undisturbed


@pytest.mark.slow
def test_monitor_leaves_training_as_it_was(run_folder: Path, shards_dir: Path) -> None:
    encoder = load_encoder(run_folder).encoder
    encoder.train()
    encoder.backbone.layer1.eval()  # a part that someone froze must stay so
    flags = [module.training for module in encoder.modules()]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    source = open_source(str(shards_dir))
    torch.manual_seed(5)
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    crops = CentralCrops(32, ((0.5,) * 3, (0.25,) * 3), batch_size=16, num_threads=1)
    found = measure(encoder, source, source, crops, k=5)
    assert 1 / 3 < found["knn"] <= 1
    assert measure(encoder, None, source, crops) == {"rankme": pytest.approx(found["rankme"], rel=1e-6)}
    with undisturbed(encoder), torch.no_grad():
        (batch,) = (batch for batch, _ in replace(crops, batch_size=60).batches(source))
        sigma = torch.linalg.svdvals(encoder.backbone(batch.images).double())
    p = sigma / sigma.sum() + 1e-7
    assert found["rankme"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
    assert [module.training for module in encoder.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize(("samples", "images"), [(10**6, 4096), (4096, 4096), (100, 100), (5, 5)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_images_from_all_over_are_shared_by_the_ranks(samples: int, images: int, world_size: int) -> None:
    device = torch.device("cpu")
    ids = [i for rank in range(world_size) for r in spread_ranges(samples, Ranks(rank, world_size, device)) for i in r]
    assert len(ids) == len(set(ids)) == images
    assert 0 <= min(ids) <= max(ids) < samples
    assert max(ids) > 0.9 * samples or samples < 10
