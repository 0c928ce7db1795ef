"""The DALI graph: encoded images and view parameters in, normalised channels-last views on the device out.

1. `lend`: encoded bytes and view parameters (views.COLUMNS) as DALI wants them, without a copy of the bytes. All that
   can be computed once for a batch in NumPy is computed here, in whichever thread reads, and not in the graph.
2. decoders.image: once per image, shared by its views; turned upright as its EXIF tag says.
3. On the CPU `render`: crop, resize, colour, blur, flip and normalisation, fused (kernels_cpu.py).
   On a GPU `crop`: crop, resize and flip; then `Finish`: the rest for a whole batch, fused (kernels_gpu.py).

The device is an argument of the same function. Views leave as HWC: the tensors are channels-last without a transpose.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from pipeline.pixels import views
from pipeline.pixels.views import IMAGENET, Triple
from pipeline.progress import saying

# A batch for the graph, as `lend` makes it.
Lent = tuple[TensorListCPU, ...]
Feed = Callable[[], Lent]

# DALI's errors name the operator; and these words, or the codec's other codes, mean the GPU and not the image.
DECODER = "fn.decoders.image`"
NOT_THE_IMAGE = re.compile(r"CUDA|cuda|nvml|memory|alloc|nvImageCodec failure: '#(?![34]')")


class DecodeError(RuntimeError):
    """DALI could not decode an image of the batch."""


def lend(encoded: Sequence[NDArray[np.uint8]], rows: Sequence[views.Views], *, image_size: int, device: str) -> Lent:
    """A batch for the graph: n encoded images (uint8 [bytes]) and the parameters of each view (float32 [n, P]).

    DALI reads the arrays where they lie: nobody may write to them until the views have come out (Graph.run).
    """
    arrays = [TensorCPU(image) for image in encoded]
    images = TensorListCPU(arrays, contiguous=False)  # type: ignore[call-overload]  # DALI's stubs are of an older one
    if torch.device(device).type == "cpu":
        return images, *map(TensorListCPU, rows)
    from pipeline.pixels.kernels_gpu import with_blur_weights  # Triton is not installed everywhere

    corners = [corner for view in rows for corner in regions(view, image_size)]
    return images, *map(TensorListCPU, corners), *(TensorListCPU(with_blur_weights(view)) for view in rows)


def regions(rows: views.Views, image_size: int) -> tuple[views.Views, views.Views]:
    """Where each view's window starts and ends in its image, (y, x) in pixels: float32 [n, 2] each.

    A mirrored one ends before it starts.
    """
    scale = rows[:, views.HEIGHT : views.WIDTH + 1] / rows[:, views.GRID_HEIGHT : views.GRID_WIDTH + 1]
    start = rows[:, views.TOP : views.LEFT + 1] + rows[:, views.GRID_TOP : views.GRID_LEFT + 1] * scale
    extent = image_size * scale
    mirror = rows[:, views.FLIP : views.FLIP + 1] * np.array([0, 1], np.float32) * extent
    return start + mirror, start + extent - mirror


def render(image_size: int, mean: Triple, std: Triple) -> Callable[[Any, Any], Any]:
    """The operator (images, rows) -> finished views float32 [S, S, 3] on the CPU."""
    # Imported here: a GPU needs none of it, and numba.cuda, which the plugin imports, is trouble on some machines.
    from nvidia.dali.plugin.numba import NumbaFunction

    with saying("compiling the functions that make views on the CPU, once on this machine: about 10 s"):
        from pipeline.pixels.kernels_cpu import render_sample, shape_setter

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


def crop(images: Any, start: Any, end: Any, image_size: int) -> Any:
    """Views uint8 [S, S, 3], cropped, resized and mirrored, on the images' device; start and end as in `regions`.

    DALI's filter reads beyond the window, where Pillow's ends: that makes 0.16 levels of 255 inside and 0.69 on the
    outermost pixels.
    """
    return fn.resize(
        images,
        size=(image_size, image_size),
        roi_start=start,
        roi_end=end,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


@pipeline_def
def two_views(
    feed: Feed, num_views: int, image_size: int, mean: Triple, std: Triple, gpu: bool, hw_decoder_load: float
) -> tuple[Any, ...]:
    floats = 3 * num_views if gpu else num_views
    encoded, *lent = fn.external_source(
        feed, num_outputs=1 + floats, batch=True, no_copy=True, dtype=[types.UINT8] + floats * [types.FLOAT]
    )
    images = fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # the CPU's and Pillow's way with chroma; off by default on a GPU
        hw_decoder_load=hw_decoder_load,
    )
    if gpu:
        corners, rows = lent[: 2 * num_views], lent[2 * num_views :]
        pixels = [crop(images, start, end, image_size) for start, end in zip(corners[::2], corners[1::2])]
        return *pixels, *(row.gpu() for row in rows)
    finish = render(image_size, mean, std)
    return tuple(finish(images, row) for row in lent)


class Graph:
    """Runs the graph over what `feed` returns, `prefetch` batches ahead of `run`.

    feed() returns what `lend` makes of up to batch_size images, for the same image_size and device, and raises
    StopIteration at the end. device: "cpu", "cuda" or "cuda:i".
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
        self._feed = feed
        self._lent: deque[Lent] = deque()  # batches inside DALI, oldest first
        self._in_use: deque[tuple[torch.cuda.Event, object]] = deque()  # memory of DALI's that the GPU may still read
        self._pipeline = two_views(
            self._lend_next,
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

    def _lend_next(self) -> Lent:
        batch = self._feed()
        # Kept until its views are out: so it is never one of DALI's threads that frees an array, for which it would
        # have to wait for the interpreter's lock.
        self._lent.append(batch)
        return batch

    def run(self) -> tuple[torch.Tensor, ...]:
        """The views of the next batch: one tensor [n, 3, S, S] each, channels-last, normalised.

        Raises StopIteration at the end, and DecodeError when a sample does not decode; the next call then goes on with
        the next batch. On a GPU the work is queued on the current stream, not waited for.
        """
        if self.device.type == "cpu":
            outputs, _ = self._next_outputs(None)
            tensors = [torch.from_dlpack(out.as_tensor()) for out in outputs]
            return tuple(view.permute(0, 3, 1, 2).to(self.dtype) for view in tensors)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            while self._in_use and self._in_use[0][0].query():
                self._in_use.popleft()
            outputs, lent = self._next_outputs(stream)
            # Not by DLPack: DALI frees what it has handed out so in a thread that calls cudaDeviceSynchronize, which
            # spins and takes a core. These tensors are only views of DALI's memory.
            tensors = [torch.as_tensor(out.as_tensor(), device=self.device) for out in outputs]
            half = len(tensors) // 2
            finished = tuple(self._finish(pixels, rows) for pixels, rows in zip(tensors[:half], tensors[half:]))
            # DALI takes its memory back, in the order of its own stream and so without regard to this one, as soon as
            # `outputs` is gone. An event behind the kernels that read it says when it may go: the host is often
            # several steps ahead.
            done = torch.cuda.Event()
            done.record(stream)
            self._in_use.append((done, (outputs, lent)))
            return finished

    def _next_outputs(self, stream: "torch.cuda.Stream | None") -> tuple[tuple[Any, ...], Lent]:
        """What DALI made of the oldest batch, ready on `stream`, or on the host; and that batch."""
        try:
            outputs = self._pipeline.run(stream)
        except RuntimeError as error:
            where, _, what = str(error).rpartition("encountered:")
            if DECODER not in where or NOT_THE_IMAGE.search(what):
                raise
            self._lent.popleft()
            raise DecodeError(" ".join(what.split())) from error
        return outputs, self._lent.popleft()

    def close(self) -> None:
        """Frees the pipeline's threads and buffers; views handed out stay valid."""
        for done, _ in self._in_use:
            done.synchronize()
        self._in_use.clear()
        del self._pipeline
