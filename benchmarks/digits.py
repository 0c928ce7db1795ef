"""Writes scikit-learn's handwritten digits as an image folder: data for the demo that no download is needed for.

python benchmarks/digits.py DESTINATION   ->  DESTINATION/{train,val}/{0..9}/*.png   (1,438 + 359 grey images)
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 32  # the originals are 8x8; enlarged so that a crop of them still shows something


def main(destination: Path) -> None:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], the originals hold 0..16
    for i, (image, label) in enumerate(zip(pixels, digits.target)):
        folder = destination / ("val" if i % 5 == 4 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        large.save(folder / f"{i:04d}.png")
    print(f"{len(pixels):,} digits written to {destination}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DESTINATION")
    main(Path(sys.argv[1]))
