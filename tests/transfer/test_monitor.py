"""The kNN monitor leaves a training encoder as it found it."""

from pathlib import Path

import numpy as np
import torch

from pipeline.sources.opening import open_source
from transfer.load import CentralCrops, load_encoder
from transfer.monitor import knn_accuracy


def test_monitor_leaves_training_as_it_was(run_folder: Path, shards_dir: Path) -> None:
    encoder = load_encoder(run_folder).encoder
    encoder.train()
    encoder.backbone.layer1.eval()  # a part that someone froze must stay so
    flags = [module.training for module in encoder.modules()]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    source = open_source(str(shards_dir))
    torch.manual_seed(5)
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    accuracy = knn_accuracy(
        encoder,
        source,
        source,
        CentralCrops(32, ((0.5,) * 3, (0.25,) * 3), batch_size=16, num_threads=1),
        k=5,
    )
    assert 1 / 3 < accuracy <= 1
    assert [module.training for module in encoder.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
