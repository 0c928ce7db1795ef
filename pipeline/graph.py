"""The DALI graph: encoded images and view parameters in, normalised channels-last views on the device out.

1. external_source: encoded bytes and one row of view parameters (views.COLUMNS) per image and view.
2. decoders.image: once per image, shared by its views.
3. augment: crop, resize, colour, blur, flip, normalise, fused (kernels_cpu.py, kernels_gpu.py), one line per view.

The device is an argument of the same function. Views leave as HWC: the tensors are channels-last without a transpose.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.numba import NumbaFunction

from pipeline.kernels_cpu import render_sample
from pipeline.views import IMAGENET, Triple

# Encoded bytes [n], then the parameters float32 [n, P] of each view.
Feed = Callable[[], tuple[Any, ...]]


class _Render(NumbaFunction):
    """DALI's numba operator, calling a function that is compiled already."""

    def _get_run_fn_cpu(self, run_fn: int, *_: Any) -> int:
        return run_fn


def _augment_cpu(image_size: int) -> Callable[..., Any]:
    def set_shapes(outs: Any, _: Any) -> None:
        for shape in outs[0]:
            shape[0], shape[1], shape[2] = image_size, image_size, 3

    return _Render(
        run_fn=render_sample.address,
        setup_fn=set_shapes,
        in_types=[types.UINT8, types.FLOAT, types.FLOAT],
        ins_ndim=[3, 1, 2],
        out_types=[types.FLOAT],
        outs_ndim=[3],
    )


@pipeline_def
def two_views(feed: Feed, num_views: int, image_size: int, mean: Triple, std: Triple, device: str) -> tuple[Any, ...]:
    encoded, *rows = fn.external_source(
        feed, num_outputs=1 + num_views, batch=True, dtype=[types.UINT8] + num_views * [types.FLOAT]
    )
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    norm = types.Constant(np.array([mean, std], np.float32), device="cpu")
    augment = _augment_cpu(image_size)
    return tuple(augment(images, row, norm) for row in rows)


class Graph:
    """Runs the graph over what `feed` returns, `prefetch` batches ahead of `run`.

    feed() returns (encoded images: n uint8 arrays, parameters of view 0: float32 [n, P], ..., of view num_views - 1),
    with n up to batch_size, and raises StopIteration at the end.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        num_views: int,
        image_size: int,
        batch_size: int,
        device: str,
        dtype: torch.dtype,
        num_threads: int,
        prefetch: int = 2,
        mean: Triple = IMAGENET[0],
        std: Triple = IMAGENET[1],
    ) -> None:
        if device != "cpu":
            raise ValueError(f"device {device}: not yet")
        self.dtype = dtype
        self.pipeline = two_views(
            feed,
            num_views,
            image_size,
            mean,
            std,
            "cpu",
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=None,
            prefetch_queue_depth=prefetch,
        )
        self.pipeline.build()

    def run(self) -> tuple[torch.Tensor, ...]:
        """The views of the next batch: one tensor [n, 3, S, S] each, channels-last, normalised.

        Raises StopIteration at the end, and RuntimeError when a sample does not decode; the next call then goes on with
        the next batch.
        """
        outputs = self.pipeline.run()
        return tuple(torch.from_dlpack(out.as_tensor()).permute(0, 3, 1, 2).to(self.dtype) for out in outputs)

    def close(self) -> None:
        del self.pipeline
