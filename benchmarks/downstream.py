"""Detectors and the FCN, shown for real on a CPU: each is trained on a few images until it finds what is on them.

    python benchmarks/downstream.py --voc VOCDEVKIT --coco COCO --output benchmarks/results/downstream_cpu

1. Faster R-CNN C4 on VOC, Mask R-CNN FPN on COCO, Keypoint R-CNN FPN on drawn figures with known joints, the FCN on
   COCO's masks made to class maps: all on an untrained ResNet-18, on few images with few, large objects, and judged on
   the images that they were trained on. AP50 or mIoU of 30 shows that a path works, and nothing about an encoder.
2. One step of each with ResNet-50, images of full size, in a process of its own: seconds and peak memory.

Writes OUTPUT.json, OUTPUT.txt, and the pictures OUTPUT_*.png.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
COUNTS = {"c4_voc": "AP50", "fpn_masks_coco": "mask_AP50", "fpn_keypoints_drawn": "keypoint_AP50", "fcn_coco": "mIoU"}
NAMES = tuple(COUNTS)  # the parts, and the figure that counts
JOINTS = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
ENOUGH = 30.0
CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True, help="a VOCdevkit with VOC2007")
    parser.add_argument("--coco", type=Path, required=True, help="a folder with annotations/instances_train2017.json")
    parser.add_argument("--output", type=Path, default=Path("downstream"), help="beginning of the files to write")
    parser.add_argument("--only", choices=[*NAMES, "full_size"], nargs="+", help="some of the parts")
    parser.add_argument("--full_size_step", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.full_size_step:
        print(json.dumps(full_size_step(args.full_size_step)))
        return
    wanted = args.only or [*NAMES, "full_size"]
    path = args.output.with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.hardware import hardware  # torch takes seconds

    results["hardware"] = hardware("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in NAMES:
            if name in wanted:
                results[name] = trained(name, work, args)
                path.write_text(json.dumps(results, indent=1) + "\n")
        if "full_size" in wanted:
            for name in NAMES:
                command = [sys.executable, __file__, "--voc", "-", "--coco", "-", "--full_size_step", name]
                results[f"{name}_resnet50_full_size"] = last_object(command)
                path.write_text(json.dumps(results, indent=1) + "\n")
    text = as_text(results)
    args.output.with_suffix(".txt").write_text(text)
    print(text, end="")
    print(json.dumps(results))


# --- small trainings --------------------------------------------------------------------------------------------------


def trained(name: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The last line of one command, with the command itself."""
    run = work / "run"
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": "-", "out": str(run), "arch": "resnet18"}))
    out = work / name
    common = {"batch_size": 4, "seed": 0, "num_threads": 1, "save_every": 1000, "log_every": 10}
    small: dict[str, Any] = common | {"batch_size": 2, "proposals": 20, "precise_batches": 8, "warmup": 10}
    if name == "c4_voc":
        data, images = few_of_voc(args.voc, work / "VOCdevkit", 4)
        sets = "[2007_trainval]"
        flags = small | {"body": "c4", "task": "boxes", "short_side": 96, "rois": 8, "lr": 0.01, "iterations": 150}
    elif name == "fpn_masks_coco":
        data, images = few_of_coco(args.coco, work / "coco", 4)
        sets = "[instances_train2017]"
        flags = small | {"body": "fpn", "task": "masks", "short_side": 96, "rois": 16, "lr": 0.01, "iterations": 150}
    elif name == "fpn_keypoints_drawn":
        data, images = draw_figures(work / "figures", 2)
        sets = "[person_keypoints_drawn]"
        flags = small | {"body": "fpn", "task": "keypoints", "short_side": 96, "rois": 16, "lr": 0.01}
        flags |= {"batch_size": 1, "iterations": 140}  # the head for joints is the most costly
    else:
        coco, _ = few_of_coco(args.coco, work / "coco", 8)
        data, images = class_maps_of(coco, work / "maps" / "VOCdevkit")
        sets = "[2012_train]"
        flags = common | {"crop": 129, "short_side": 128, "lr": 0.02, "iterations": 160}
    module = "transfer.segment" if name == "fcn_coco" else "transfer.detect"
    command = [sys.executable, "-m", module, "--run", str(run), "--untrained", "--data", str(data), "--out", str(out)]
    command += ["--train_set", sets, "--val_set", sets]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {key: value for key, value in last_object(command).items() if key not in ("run", "out")}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    picture = next(out.glob("[ds]e*ion*.png"))
    shutil.copyfile(picture, args.output.with_name(f"{args.output.name}_{name}.png"))
    about = {"images": images, "encoder": "resnet18, untrained", "flags": flags, "wall_s": time.monotonic() - started}
    about["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    reached = found[COUNTS[name]]
    return {"figure": COUNTS[name], "reached": reached, "enough": reached >= ENOUGH, **about, "result": found}


def last_object(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | CPU, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def few_of_voc(devkit: Path, folder: Path, count: int) -> tuple[Path, int]:
    """A VOCdevkit with `count` images of few, large objects, which are linked to."""
    from transfer.detection_data import open_annotated

    data = open_annotated(devkit, ["2007_trainval"])
    chosen = [data.files[i].stem for i in range(len(data.files)) if few_and_large(data.images[i], data.objects[i])]
    year = folder / "VOC2007"
    (year / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for part in ("JPEGImages", "Annotations"):
        if not (year / part).exists():
            (year / part).symlink_to((devkit / "VOC2007" / part).resolve())
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(chosen[:count]) + "\n")
    return folder, len(chosen[:count])


def few_of_coco(coco: Path, folder: Path, count: int) -> tuple[Path, int]:
    """A folder in COCO's layout with `count` images of few, large objects."""
    from transfer.detection_data import open_annotated

    data = open_annotated(coco, ["instances_train2017"])
    chosen = [image for image, objects in zip(data.images, data.objects) if few_and_large(image, objects)][:count]
    ids = {image["id"] for image in chosen}
    objects = [a for a in data.truth["annotations"] if a["image_id"] in ids]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    if not (folder / "train2017").exists():
        (folder / "train2017").symlink_to((coco / "train2017").resolve())
    truth = {"images": chosen, "annotations": objects, "categories": data.truth["categories"]}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(truth))
    return folder, len(chosen)


def few_and_large(image: dict[str, Any], objects: list[dict[str, Any]]) -> bool:
    """One to three objects, no crowd, each 3 % of the image or more."""
    least = 0.03 * image["width"] * image["height"]
    large = all(o["bbox"][2] * o["bbox"][3] >= least and not o["iscrowd"] for o in objects)
    return 1 <= len(objects) <= 3 and large


def voc_name(name: str) -> str:
    """VOC's name of one of COCO's classes."""
    others = {"airplane": "aeroplane", "motorcycle": "motorbike", "dining table": "diningtable", "couch": "sofa"}
    return (others | {"potted plant": "pottedplant", "tv": "tvmonitor"}).get(name, name)


def class_maps_of(coco: Path, folder: Path) -> tuple[Path, int]:
    """COCO's masks as VOC's SegmentationClass, the smaller objects on top; all but VOC's classes is background."""
    from transfer.detection_data import VOC_CLASSES, masks_of, open_annotated

    data = open_annotated(coco, ["instances_train2017"])
    year = folder / "VOC2012"
    for part in ("ImageSets/Segmentation", "SegmentationClass"):
        (year / part).mkdir(parents=True, exist_ok=True)
    if not (year / "JPEGImages").exists():
        (year / "JPEGImages").symlink_to((coco / "train2017").resolve())
    for file, image, objects in zip(data.files, data.images, data.objects):
        numbers = np.zeros((image["height"], image["width"]), np.uint8)
        objects = sorted(objects, key=lambda o: -o["area"])
        for each, mask in zip(objects, masks_of(objects, image["height"], image["width"])):
            name = voc_name(data.classes[each["label"] - 1])
            numbers[mask > 0] = VOC_CLASSES.index(name) + 1 if name in VOC_CLASSES else 0
        picture = Image.fromarray(numbers)
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        picture.save(year / "SegmentationClass" / f"{file.stem}.png")
    names = "\n".join(file.stem for file in data.files) + "\n"
    (year / "ImageSets" / "Segmentation" / "train.txt").write_text(names)
    return folder, len(data.files)


def draw_figures(folder: Path, count: int) -> tuple[Path, int]:
    """Stick figures of five joints on noise, in COCO's format."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, objects = [], list[dict[str, Any]]()
    for i in range(count):
        picture = Image.fromarray(rng.integers(90, 130, (128, 160, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        x, y = int(rng.integers(40, 120)), int(rng.integers(30, 50))
        middle = (x, y + 40)
        ends = [(x, y), *((x + s * int(rng.integers(15, 30)), y + int(rng.integers(5, 35))) for s in (-1, 1))]
        ends += [(x + s * int(rng.integers(8, 20)), y + int(rng.integers(60, 72))) for s in (-1, 1)]
        for end, colour in zip(ends, ("#ffd43b", "#e03131", "#1971c2", "#2f9e44", "#9c36b5")):
            pen.line([(x, y + 15) if end[1] < y + 40 else middle, end], fill="#f8f9fa", width=3)
            pen.ellipse([end[0] - 4, end[1] - 4, end[0] + 4, end[1] + 4], fill=colour)
        pen.line([(x, y), middle], fill="#f8f9fa", width=3)
        low, high = np.min(ends, axis=0) - 6, np.max(ends, axis=0) + 6
        box = [int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])]
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 128})
        about = {"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": box, "area": box[2] * box[3]}
        objects.append(about | {"keypoints": [int(v) for end in ends for v in (*end, 2)], "num_keypoints": 5})
    kinds = [{"id": 1, "name": "figure", "keypoints": list(JOINTS)}]
    truth = {"images": images, "annotations": objects, "categories": kinds}
    (folder / "annotations" / "person_keypoints_drawn.json").write_text(json.dumps(truth))
    return folder, count


# --- full size --------------------------------------------------------------------------------------------------------


def full_size_step(name: str) -> dict[str, Any]:
    """One step of SGD with ResNet-50 on one image of the size that the paper trains on, in this process."""
    import torch

    from model.encoders import build_encoder
    from pipeline.pixels.views import mean_std
    from trainer.metrics import memory_gb
    from transfer.detectors import build_detector
    from transfer.segment import Batch, Protocol, build_fcn, forward

    torch.manual_seed(0)
    encoder = build_encoder("resnet50")
    size = {"c4_voc": "800 x 1066", "fcn_coco": "513 x 513"}.get(name, "800 x 1066")
    if name == "fcn_coco":
        net, count = build_fcn(encoder, 21), 2  # batch norm takes no single image where a map is small
        batch = Batch(torch.randn(2, 3, 513, 513), torch.randint(0, 21, (2, 513, 513)))
    else:
        body, task = {"c4_voc": ("c4", "boxes"), "fpn_masks_coco": ("fpn", "masks")}.get(name, ("fpn", "keypoints"))
        net, count = build_detector(encoder, body, task, 20, mean_std=mean_std("v1")), 1  # type: ignore[arg-type]
        boxes = torch.tensor([[100.0, 100, 400, 380], [300, 50, 640, 480]])
        masks = torch.zeros(2, 600, 800, dtype=torch.uint8)
        masks[:, 120:350, 320:390] = 1
        points = torch.cat([torch.full((2, 17, 2), 350.0), torch.ones(2, 17, 1)], dim=2)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": points}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    began = time.monotonic()
    if name == "fcn_coco":
        loss = forward(net, batch)[0]
    else:
        loss = torch.stack(list(net([torch.rand(3, 600, 800)], [target]).values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    seconds = time.monotonic() - began
    about = {"images": count, "pixels": size, "loss": round(float(loss.detach()), 4), "step_s": round(seconds, 1)}
    protocol = asdict(Protocol()) if name == "fcn_coco" else {}
    about |= {"crop": protocol["crop"]} if protocol else {"rois": 512}
    return about | {"peak_memory_gb": round(memory_gb(torch.device("cpu")), 2), "torch": torch.__version__}


def as_text(results: dict[str, Any]) -> str:
    lines = ["detectors and the FCN on a CPU: python benchmarks/downstream.py (see its head)"]
    facts = results["hardware"]
    lines += [f"{facts['cpu_cores']} cores, Python {facts['python']}, torch {facts['torch']}", ""]
    for name in NAMES:
        if (one := results.get(name)) is not None:
            flags = " ".join(f"{k} {v}" for k, v in one["flags"].items() if k in ("short_side", "iterations", "rois"))
            said = f"{one['figure']} {one['reached']:.1f} on its {one['images']} training images"
            lines.append(f"{name:<20} {said}; {flags}; {one['cpu_s']:.0f} s of CPU, {one['wall_s']:.0f} s in all")
    lines += ["", "one step of ResNet-50 at full size, batch norm trained, fp32, one thread"]
    for name in NAMES:
        if (one := results.get(f"{name}_resnet50_full_size")) is not None:
            said = f"{one['images']} images of {one['pixels']}: {one['step_s']} s"
            lines.append(f"{name:<20} {said}, peak memory of the process {one['peak_memory_gb']} GB")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
