"""Makes the small files beside it, with the programs that people have them from: img2dataset and Hugging Face datasets.

    python tests/foreign/make_foreign.py

Once, by hand: the programs go into a virtual environment of their own, which is removed afterwards, and download from a
server on loopback. The images are drawn here. `tests/packing/test_foreign_inputs.py` packs what comes out.
"""

import argparse
import contextlib
import functools
import http.server
import io
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("img2dataset==1.47.0", "datasets==5.2.0", "pillow==13.0.0", "pyarrow==26.0.1")
CLASSES = ("square", "circle", "bar")  # in no alphabetical order: their numbers are those of the list
IMAGES = 5


def draw(i: int, *, mask: bool = False) -> bytes:
    """A JPEG of about 1 kB; `mask`: a PNG of its shape alone."""
    from PIL import Image, ImageDraw

    image = Image.new("L" if mask else "RGB", (56 + 4 * i, 48), 0 if mask else (40 * i % 256, 90, 255 - 30 * i))
    pen = ImageDraw.Draw(image)
    shape, ink = i % 3, 255 if mask else (250, 220 - 20 * i, 60)
    if shape == 0:
        pen.rectangle((10, 10, 36, 36), fill=ink)
    elif shape == 1:
        pen.ellipse((8, 6, 40, 40), fill=ink)
    else:
        pen.rectangle((22, 2, 30, 46), fill=ink)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if mask else "JPEG", **({} if mask else {"quality": 80}))
    return buffer.getvalue()


def img2dataset(out: Path, work: Path) -> None:
    """The three layouts, from the same list: five images and a dead link, three lines a shard."""
    import img2dataset as program

    served = work / "served"
    served.mkdir()
    for i in range(IMAGES):
        (served / f"{i}.jpg").write_bytes(draw(i))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [f"{i}.jpg" for i in range(IMAGES)]
    names.insert(2, "missing.jpg")
    lines = [f"http://127.0.0.1:{server.server_port}/{name},a {CLASSES[i % 3]},{i}" for i, name in enumerate(names)]
    (work / "list.csv").write_text("url,caption,rating\n" + "\n".join(lines) + "\n")
    for layout in ("files", "webdataset", "parquet"):
        program.download(
            url_list=str(work / "list.csv"),
            input_format="csv",
            output_folder=str(out / f"img2dataset_{layout}"),
            output_format=layout,
            url_col="url",
            caption_col="caption",
            save_additional_columns=["rating"],
            disable_all_reencoding=True,
            number_sample_per_shard=3,
            thread_count=2,
            processes_count=1,
            enable_wandb=False,
        )
    server.shutdown()


def hugging_face(out: Path, work: Path) -> None:
    """Two tables of one split, as the hub keeps them, and one with a second image and with labels of another name."""
    from datasets import ClassLabel, Dataset, Features, Image, List, Value
    from datasets.table import embed_table_storage

    def write(table: Dataset, name: str, rows: int) -> None:
        """With the images inside, as push_to_hub does it."""
        embedded = table.with_format("arrow").map(embed_table_storage, batched=True, batch_size=rows)
        embedded.to_parquet(str(out / name), batch_size=rows)

    folder = work / "images"
    folder.mkdir()
    for i in range(IMAGES):
        (folder / f"{i}.jpg").write_bytes(draw(i))
        (folder / f"{i}.png").write_bytes(draw(i, mask=True))
    paths = [str(folder / f"{i}.jpg") for i in range(IMAGES)]
    kinds = [i % 3 for i in range(IMAGES)]
    labelled = Dataset.from_dict(
        {"image": paths, "label": kinds, "width": [56 + 4 * i for i in range(IMAGES)]},
        features=Features({"image": Image(), "label": ClassLabel(names=list(CLASSES)), "width": Value("int32")}),
    )
    (out / "datasets").mkdir()
    for i in range(2):
        write(labelled.shard(2, i, contiguous=True), f"datasets/train-{i:05d}-of-00002.parquet", 2)
    more = Dataset.from_dict(
        {
            "picture": paths,
            "mask": [str(folder / f"{i}.png") for i in range(IMAGES)],
            "fine_label": kinds,
            "tags": [[k, (k + 1) % 3] for k in kinds],
            "note": [f"number {i}" for i in range(IMAGES)],
        },
        features=Features(
            {
                "picture": Image(),
                "mask": Image(),
                "fine_label": ClassLabel(names=list(CLASSES)),
                "tags": List(ClassLabel(names=list(CLASSES))),
                "note": Value("string"),
            }
        ),
    )
    write(more, "two_images.parquet", 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of what is made")
    parser.add_argument("--python", default="", help="interpreter that has the programs; empty: install them first")
    parser.add_argument("--inside", action="store_true", help="this is that interpreter")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if args.inside:
            img2dataset(args.output, work)
            hugging_face(args.output, work)
            return
        python = args.python
        if not python:
            venv.create(work / "venv", with_pip=True)
            python = str(work / "venv" / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PROGRAMS], check=True)
        made = work / "made"
        made.mkdir()
        subprocess.run([python, __file__, "--inside", "--output", str(made)], check=True)
        for item in sorted(made.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                there = args.output / item.name
                shutil.rmtree(there) if there.is_dir() else there.unlink()
            shutil.move(item, args.output / item.name)
    files = [path for path in args.output.rglob("*") if path.is_file() and path.suffix != ".py"]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes, in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
