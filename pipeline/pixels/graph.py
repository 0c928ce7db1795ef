"""The DALI graph: encoded images and view parameters in, normalised channels-last views on the device out.

1. external_source: encoded bytes, and one row of view parameters (views.COLUMNS) per image and view.
2. decoders.image: once per image, shared by its views; turned upright as its EXIF tag says.
3. On the CPU `render`: crop, resize, colour, blur, flip and normalisation, fused (kernels_cpu.py).
   On a GPU `crop`: crop, resize and flip; then `Finish`: the rest for a whole batch, fused (kernels_gpu.py).

The device is an argument of the same function. Views leave as HWC: the tensors are channels-last without a transpose.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.pixels import views
from pipeline.pixels.views import IMAGENET, Triple

# Encoded bytes [n], then the parameters float32 [n, P] of each view.
Feed = Callable[[], tuple[Any, ...]]


def render(image_size: int, mean: Triple, std: Triple) -> Callable[[Any, Any], Any]:
    """The operator (images, rows) -> finished views float32 [S, S, 3] on the CPU."""
    # Imported here: a GPU needs none of it, and numba.cuda, which the plugin imports, is trouble on some machines.
    from nvidia.dali.plugin.numba import NumbaFunction

    from pipeline.pixels.kernels_cpu import render_sample, shape_setter  # compiled here: about 10 s, once on a machine

    class Compiled(NumbaFunction):
        """DALI's numba operator, given the addresses of functions that are compiled already."""

        def _get_run_fn_cpu(self, run_fn: int, *_: Any) -> int:
            return run_fn

        def _get_setup_fn_cpu(self, setup_fn: int) -> int:
            return setup_fn

    operator = Compiled(
        run_fn=render_sample.address,
        setup_fn=shape_setter(image_size).address,
        in_types=[types.UINT8, types.FLOAT, types.FLOAT],
        ins_ndim=[3, 1, 2],
        out_types=[types.FLOAT],
        outs_ndim=[3],
    )
    norm = types.Constant(np.array([mean, std], np.float32), device="cpu")
    return lambda images, row: operator(images, row, norm)


def crop(images: Any, row: Any, image_size: int) -> Any:
    """Views uint8 [S, S, 3], cropped, resized and mirrored, on the images' device."""
    scale = row[views.HEIGHT : views.WIDTH + 1] / row[views.GRID_HEIGHT : views.GRID_WIDTH + 1]
    start = row[views.TOP : views.LEFT + 1] + row[views.GRID_TOP : views.GRID_LEFT + 1] * scale
    extent = image_size * scale
    # A region that ends before it starts comes out mirrored.
    mirror = row[views.FLIP : views.FLIP + 1] * types.Constant(np.array([0, 1], np.float32), device="cpu") * extent
    return fn.resize(
        images,
        size=(image_size, image_size),
        roi_start=start + mirror,
        roi_end=start + extent - mirror,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


@pipeline_def
def two_views(
    feed: Feed, num_views: int, image_size: int, mean: Triple, std: Triple, gpu: bool, hw_decoder_load: float
) -> tuple[Any, ...]:
    encoded, *rows = fn.external_source(
        feed, num_outputs=1 + num_views, batch=True, dtype=[types.UINT8] + num_views * [types.FLOAT]
    )
    images = fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # the CPU's and Pillow's way with chroma; off by default on a GPU
        hw_decoder_load=hw_decoder_load,
    )
    if gpu:
        return *(crop(images, row, image_size) for row in rows), *(row.gpu() for row in rows)
    finish = render(image_size, mean, std)
    return tuple(finish(images, row) for row in rows)


class Graph:
    """Runs the graph over what `feed` returns, `prefetch` batches ahead of `run`.

    feed() returns (encoded images: n uint8 arrays, parameters of view 0: float32 [n, P], ..., of view num_views - 1),
    with n up to batch_size, and raises StopIteration at the end. device: "cpu", "cuda" or "cuda:i".
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
        hw_decoder_load: float = 0.65,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        gpu = self.device.type == "cuda"
        if gpu:
            from pipeline.pixels.kernels_gpu import Finish  # Triton is not installed everywhere

            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self._finish = Finish(mean, std, dtype, self.device)
        self._pipeline = two_views(
            feed,
            num_views,
            image_size,
            mean,
            std,
            gpu,
            hw_decoder_load,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=index if gpu else None,
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()

    def run(self) -> tuple[torch.Tensor, ...]:
        """The views of the next batch: one tensor [n, 3, S, S] each, channels-last, normalised.

        Raises StopIteration at the end, and RuntimeError when a sample does not decode; the next call then goes on with
        the next batch. On a GPU the work is queued on the current stream, not waited for.
        """
        if self.device.type == "cpu":
            outputs = (torch.from_dlpack(out.as_tensor()) for out in self._pipeline.run())
            return tuple(view.permute(0, 3, 1, 2).to(self.dtype) for view in outputs)
        with torch.cuda.device(self.device):
            # Bound to this stream, DALI's buffers are reused only after the kernels below have read them.
            outputs = self._pipeline.run(cuda_stream=torch.cuda.current_stream())
            tensors = [torch.from_dlpack(out.as_tensor()) for out in outputs]
            half = len(tensors) // 2
            return tuple(self._finish(pixels, rows) for pixels, rows in zip(tensors[:half], tensors[half:]))

    def close(self) -> None:
        """Frees the pipeline's threads and buffers; views handed out stay valid."""
        del self._pipeline
