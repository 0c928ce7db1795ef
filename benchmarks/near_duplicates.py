"""Memory and time of finding near-duplicates among millions of hashes, without the images.

    python benchmarks/near_duplicates.py [--images 1000000 4000000]

Hashes are random but for one in ten, which is another with up to three bits turned; each must be found. Prints a JSON
object for each number of images: seconds of the processor, and peak memory in bytes an image, beyond what the process
has before.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.packing.near import find_near_duplicates


def measure(count: int) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "near.bin"
        hashes = np.memmap(place, np.uint64, "w+", shape=(count, 2))
        planted = count // 10
        for begin in range(0, count, 1 << 20):
            end = min(begin + (1 << 20), count)
            hashes[begin:end, 0] = rng.integers(0, 1 << 64, end - begin, np.uint64)
            hashes[begin:end, 1] = 1
        turned = np.zeros(planted, np.uint64)
        for _ in range(3):
            turned |= np.uint64(1) << rng.integers(0, 64, planted, np.uint64)
        hashes[count - planted :, 0] = hashes[:planted, 0] ^ turned
        hashes.flush()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        _, found = find_near_duplicates(hashes, 3, Path(folder))
        seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found >= planted, (found, planted)
    row = {"images": count, "planted": planted, "found": found, "cpu_seconds": round(seconds, 1)}
    print(json.dumps(row | {"bytes_an_image": round(peak * 1024 / count), "cpus": os.cpu_count()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000], help="numbers of images"
    )
    for count in parser.parse_args().images:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(count,))  # a peak of its own
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the measurement of {count:,} images failed")


if __name__ == "__main__":
    main()
