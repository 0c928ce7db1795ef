"""How each system of bad_data.py loads a folder of images: as its own documentation shows it, whole images at 64 x 64.

    python benchmarks/bad_data_systems.py SYSTEM

imports what the system needs, once, and forks a process for each job, a line of JSON on standard input. Nothing of ours
is imported for other systems, so that these run in an environment of their own. A job names

    folder   the images, f00000.jpg and so on, in class folders        tars     the same in WebDataset shards
    scratch  a folder to work in                                       batch    images in a batch
    output   gets a record of RECORD for each sample that comes out    log      gets all that is printed
    error    gets the last line of the exception that ended the epoch

The answers are two lines: the number of the process, and how it ended (an exit code, or minus a signal).
"""

import ctypes
import io
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SIDE = 64
RECORD = np.dtype([("number", "<i4"), ("pixels", "u1", (SIDE, SIDE, 3))])
NUMBER = re.compile(r"f(\d{5})")  # the name of a file, in keys, paths and messages
THREADS = 2
Load = Callable[[dict[str, Any], BinaryIO], None]


def number_of(name: str) -> int:
    """Which file a key or path names."""
    found = NUMBER.search(name.rpartition("/")[2])
    assert found is not None, name
    return int(found[1])


def deliver(output: BinaryIO, numbers: Iterable[int], pixels: Any) -> None:
    """Writes down what a training would have got: uint8 [n, SIDE, SIDE, 3] and the files that they are of."""
    numbers = list(numbers)
    records = np.empty(len(numbers), RECORD)
    records["number"], records["pixels"] = numbers, np.asarray(pixels)
    output.write(records.tobytes())
    output.flush()


def pillow() -> Load:
    """Not a system but the truth: Pillow's pixels, upright, whole, resized. Grey of 16 bits is scaled to 8 as viewers
    do it, where Pillow's own conversion makes all above level 255 white. Numbers without a range have no truth."""
    from PIL import Image, ImageOps

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        for path in job["paths"]:
            with Image.open(path) as image:
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # a broken EXIF block says nothing of the pixels
                    upright = image
                if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PPM"):
                    upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                if upright.mode in ("I", "F"):
                    raise ValueError(f"numbers of mode {upright.mode} have no black and no white")
                small = upright.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                deliver(output, [number_of(path)], np.asarray(small)[None])

    return load


def ours(unchecked: bool, max_bad_fraction: float | None = None) -> Load:
    """make_shards as a command, then the loader with a view that is the whole image: an epoch, and as many more as it
    takes until each sample was drawn (an epoch leaves out less than a batch, another time another one)."""
    import multiprocessing

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import nvidia.dali.plugin.numba  # noqa: F401 - so that each job has it
    import torch
    import webdataset  # noqa: F401 - likewise

    import pipeline.pixels.kernels_cpu  # noqa: F401 - likewise
    from pipeline import make_shards
    from pipeline.loader import Loader
    from pipeline.packing import workers
    from pipeline.packing.prepare import Options
    from pipeline.pixels.view_recipe import ViewRecipe
    from pipeline.sources.opening import open_source

    torch.set_num_threads(1)
    # A crop of next to nothing has no pixel on one side or the other, so all ten tries fail, and the image stays whole.
    plain = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    whole = ViewRecipe(crop_scale=(1e-12, 1e-12), crop_ratio=(1e-5, 1e5), **plain)  # type: ignore[arg-type]

    def pack(job: dict[str, Any], shards: Path) -> None:
        if job["together"]:
            command = [sys.executable, "pipeline/make_shards.py", job["folder"], str(shards)]
            subprocess.run([*command, *(["--no_verify"] if unchecked else [])], cwd=sys.path[0], check=True)
            return
        # For a few images the same in this process, with a worker that is forked from it: that saves two seconds of
        # imports each time.
        fork = multiprocessing.get_context("fork")
        workers.warm_up = lambda: None
        workers.multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment,return-value]
        options = Options(no_verify=unchecked)
        make_shards.make_shards(job["folder"], str(shards), options=options, num_workers=1)

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        shards = Path(job["scratch"]) / "shards"
        pack(job, shards)
        ignored = json.loads((shards / "make_shards.json").read_text())["ignored"]
        names = (path.name for path in Path(job["folder"]).rglob("*.*"))
        print("no images by their names:", *(name for name in names if name.rpartition(".")[2].lower() in ignored))
        for lines in shards.glob("rejected.jsonl"):
            print(lines.read_text())
        source = open_source(str(shards), progress=False)
        keys = our_keys(shards)
        quarantine = Path(job["scratch"]) / "quarantine.jsonl"
        limit = 1.0 if unchecked and max_bad_fraction is None else max_bad_fraction or 0.01
        loader = Loader(
            source,
            views=whole,
            image_size=SIDE,
            batch_size=min(job["batch"], source.samples),
            num_threads=THREADS,
            quarantine=quarantine,
            max_bad_fraction=limit,
        )
        undrawn, epoch = set(range(source.samples)), 0
        try:
            while undrawn:
                for step in range(loader.steps_per_epoch):
                    undrawn -= set(loader.order.draw(epoch, step).sample_ids.tolist())
                    batch = next(loader)
                    pixels = (batch.query * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
                    deliver(output, (keys[i] for i in batch.sample_ids.tolist()), pixels)
                epoch += 1
        finally:
            if quarantine.exists():
                print(quarantine.read_text())
            loader.close()

    return load


def our_keys(shards: Path) -> list[int]:
    """The number of each sample's file, in the order of the sample ids."""
    import tarfile

    numbers: dict[str, int] = {}  # by key, in the order of the shards
    for shard in json.loads((shards / "manifest.json").read_text())["shards"]:
        with tarfile.open(shards / shard["path"]) as tar:
            for name in tar.getnames():
                numbers.setdefault(f"{shard['path']}/{name.partition('.')[0]}", number_of(name))
    return list(numbers.values())


def dali(shards: bool) -> Load:
    """Its own reader of folders, or of WebDataset shards, and its own decoder, on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    def graph(files: Any) -> tuple[Any, Any]:
        images = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        small = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_LINEAR, antialias=True)
        return small, fn.get_property(files, key="source_info")

    @pipeline_def
    def of_folder(folder: str) -> tuple[Any, Any]:
        files, _ = fn.readers.file(file_root=folder, name="reader")
        return graph(files)

    @pipeline_def
    def of_shards(tars: list[str], indexes: list[str], extensions: str) -> tuple[Any, Any]:
        files = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=[extensions], name="reader")
        return graph(files)

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        how: dict[str, Any] = {"batch_size": job["batch"], "num_threads": THREADS, "device_id": None}
        pipeline = of_shards(job["tars"], job["indexes"], job["extensions"], **how) if shards else None
        pipeline = pipeline or of_folder(job["folder"], **how)
        pipeline.build()
        for _ in range(-(-pipeline.epoch_size("reader") // job["batch"])):
            images, sources = pipeline.run()
            names = (bytes(sources.at(i)).decode() for i in range(len(sources)))  # path, or tar:offset:member
            deliver(output, map(number_of, names), images.as_array())

    return load


def webdataset_pil(goes_on: bool) -> Load:
    """WebDataset and Pillow. `goes_on`: with the handler that its documentation has for bad samples."""
    import webdataset
    from PIL import Image

    def decode(sample: dict[str, Any]) -> tuple[int, np.ndarray]:
        (name,) = (name for name in sample if not name.startswith("__"))
        image = Image.open(io.BytesIO(sample[name])).convert("RGB")
        return number_of(sample["__key__"]), np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        handler = webdataset.warn_and_continue if goes_on else webdataset.reraise_exception
        dataset = webdataset.WebDataset(job["tars"], shardshuffle=False, handler=handler)
        dataset = dataset.map(decode, handler=handler).batched(job["batch"])
        for numbers, pixels in webdataset.WebLoader(dataset, batch_size=None, num_workers=1):
            deliver(output, map(int, numbers), pixels)

    return load


def torchvision_folder() -> Load:
    """ImageFolder and DataLoader with two workers."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        small = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.PILToTensor()])
        dataset = ImageFolder(job["folder"], small)
        paths = iter([path for path, _ in dataset.samples])
        for images, _ in torch.utils.data.DataLoader(dataset, job["batch"], num_workers=THREADS):
            deliver(output, (number_of(next(paths)) for _ in images), images.permute(0, 2, 3, 1))

    return load


def to_litdata(path: str) -> dict[str, Any]:
    """A sample as LitData's documentation prefers it: the file's bytes as they are."""
    import litdata

    return {"image": litdata.Image(path=path), "number": number_of(path)}


def small_tensors(sample: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torchvision.transforms.v2.functional import resize, to_dtype

    image = to_dtype(sample["image"], torch.uint8, scale=True)  # those of 16 bits would not fit into a batch
    return {**sample, "image": resize(image, [SIDE, SIDE])}


def litdata_stream() -> Load:
    """LitData: `optimize`, then its streaming data set and loader."""
    import litdata
    import torch
    import torchvision  # noqa: F401 - so that each job has it

    torch.set_num_threads(1)

    def load(job: dict[str, Any], output: BinaryIO) -> None:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{job['scratch']}/cache"
        os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{job['scratch']}/data"
        paths = sorted(map(str, Path(job["folder"]).rglob("*.*")))
        chunks = f"{job['scratch']}/chunks"
        how: dict[str, Any] = {"num_workers": 1, "chunk_bytes": "64MB", "start_method": "fork"}
        litdata.optimize(fn=to_litdata, inputs=paths, output_dir=chunks, **how)
        dataset = litdata.StreamingDataset(chunks, shuffle=False, transform=small_tensors)
        for batch in litdata.StreamingDataLoader(dataset, batch_size=job["batch"], num_workers=THREADS):
            deliver(output, map(int, batch["number"]), batch["image"].permute(0, 2, 3, 1))

    return load


SYSTEMS: dict[str, Callable[[], Load]] = {
    "pillow": pillow,
    "ours": lambda: ours(unchecked=False),
    "ours_unchecked": lambda: ours(unchecked=True),
    "dali_file": lambda: dali(shards=False),
    "dali_webdataset": lambda: dali(shards=True),
    "webdataset": lambda: webdataset_pil(goes_on=False),
    "webdataset_continue": lambda: webdataset_pil(goes_on=True),
    "torchvision": torchvision_folder,
    "litdata": litdata_stream,
}


def do(load: Load, job: dict[str, Any]) -> None:
    """A job, in a process of its own, which it ends."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        with Path(job["output"]).open("ab") as output:
            load(job, output)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        Path(job["error"]).write_text(f"{type(error).__name__}: {error}\n" if len(lines) == 1 else summary(error))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it ends, however that came about."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def main() -> None:
    end_with_parent()
    load = SYSTEMS[sys.argv[1]]()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if not process:
            end_with_parent()
            os.setpgid(0, 0)
            do(load, job)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def summary(error: BaseException) -> str:
    """The line of a long message that says what was wrong: the last that is no context of C++ or DALI."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("C++ context", "Current pipeline", "File ", "^"))]
    return f"{type(error).__name__}: {told[-1] if told else lines[-1]}\n"


if __name__ == "__main__":
    main()
