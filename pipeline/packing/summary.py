"""When all shards are packed: manifest, lists of what was left out, a picture of what was packed, a table."""

import bisect
import contextlib
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing.collect import CONTACT_SHEET, NEAR_SHEET
from pipeline.packing.fetch import FAILED, NO_HEADERS, Headers
from pipeline.packing.listing import Listing
from pipeline.packing.pair_picture import caption_font, fitted, pair_picture
from pipeline.packing.plan import PlannedShard, duplicate_pairs
from pipeline.packing.retry import Retry
from pipeline.packing.survey import listed_kinds
from pipeline.pixels.decode import BadImage, picture
from pipeline.pixels.formats import Grey16
from pipeline.sources.index import image_rank
from pipeline.sources.manifest import Manifest, Shard, parse_manifest, save_manifest

SHEET = (8, 6)  # pictures across and down
CELL, CAPTION = 128, 16  # pixels


def finish(
    dest: str,
    records: str,
    journal: Path,
    listing: Listing,
    shards: Sequence[PlannedShard],
    seed: int,
    retry: Retry | None = None,
    grey16: Grey16 | None = None,
    headers: Headers = NO_HEADERS,
) -> dict[str, Any]:
    """Writes what belongs to the shards and returns the counts; with `retry`, of these shards and those before.

    ValueError when nothing could be packed.
    """
    before = retry.before if retry else {}
    reasons: Counter[str] = Counter()
    labels: Counter[str] = Counter(before.get("labels", ()))
    # kind -> how many images it is said of, the first of them and what is said; older listings and records have none
    said = before["remarks"] if retry else listing.summary.get("remarks", {})
    remarks: dict[str, list[Any]] = {kind: list(of_kind) for kind, of_kind in said.items()}
    made: dict[str, list[Shard]] = {shard.split: [] for shard in shards}
    for split, count in before.get("shards", {}).items():
        place = files.join(_folder(dest, split), "manifest.json")
        made[split] = list(parse_manifest(files.read(place), place).shards[:count]) if count else []
    packed, image_bytes = before.get("packed", 0), before.get("image_bytes", 0)
    first: dict[str, str] = {}  # reason -> the first image that was rejected for it
    kept_lines = _lines_without(retry.numbers, dest) if retry else []
    with files.writing(files.join(dest, "rejected.jsonl")) as lines:

        def reject(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line).encode() + b"\n")
            reasons[line["reason"]] += 1
            first.setdefault(line["reason"], f"{line['name']} {line['detail']}".rstrip())

        for line in kept_lines:
            reject(line)
        for shard in shards:
            record = json.loads(files.read(files.join(records, shard.record)))
            for line in record["rejected"]:
                reject(line)
            for kind, (count, example) in record.get("remarks", {}).items():
                remarks.setdefault(kind, [0, example])[0] += count
            packed += record["samples"]
            image_bytes += record["image_bytes"]
            labels.update(record["labels"])
            if record["samples"]:
                file = f"shard-{shard.number:06d}.tar"
                made[shard.split].append(Shard(file, record["samples"], record["bytes"], record["checksum"]))
    if not packed:
        reason, count = reasons.most_common(1)[0]
        raise ValueError(
            f"none of the {len(listing):,} images can be used; {count:,}: {reason}, the first {first[reason]}"
        )
    if retry:
        duplicates, bits_apart = before["duplicates"], before.get("bits_apart", {})
    else:
        duplicates, bits_apart = _write_duplicates(dest, journal, listing, seed, headers, grey16)
    found, rejected = len(listing), reasons.total()
    if found != packed + rejected + duplicates:
        raise RuntimeError(f"found {found} != packed {packed} + rejected {rejected} + duplicates {duplicates}")
    for split, of_split in made.items():
        folder = _folder(dest, split)
        manifest = Manifest(folder, tuple(of_split), class_names(listing), grey16_range=grey16)
        _save_manifest(manifest, files.join(folder, "manifest.json"))
    tars = [
        (s, shard.samples) for split, of in made.items() for shard in of for s in [f"{split}/{shard.path}".lstrip("/")]
    ]
    files.write(files.join(dest, CONTACT_SHEET), contact_sheet(dest, tars, class_names(listing), seed, grey16))
    labels.pop("", None)
    counts = {
        "found": found,
        "packed": packed,
        "rejected": rejected,
        "duplicates": duplicates,
        **({"bits_apart": bits_apart} if bits_apart else {}),
        "reasons": dict(reasons.most_common()),
        "first_rejected": first,
        "classes": len(labels),
        "image_bytes": image_bytes,
        "shards": {split: len(of_split) for split, of_split in made.items()},
        "samples": {split: sum(s.samples for s in of_split) for split, of_split in made.items()},
        "ignored": listing.summary["ignored"],
        "remarks": remarks,
    }
    if reasons.keys() & set(FAILED):  # a retry may add to them
        counts["labels"] = sorted(labels)
    return counts


def _folder(dest: str, split: str) -> str:
    return files.join(dest, split).rstrip("/")


def _lines_without(numbers: list[int], dest: str) -> list[dict[str, Any]]:
    """The lines of rejected.jsonl but for those of these images."""
    retried = set(numbers)
    lines = map(json.loads, files.read(files.join(dest, "rejected.jsonl")).splitlines())
    return [line for line in lines if line.get("number") not in retried]


def class_names(listing: Listing) -> tuple[str, ...]:
    """Names by number; labels that came as numbers are their own names, unless the source named its numbers."""
    if named := listing.summary.get("class_names"):  # older listings have none
        return tuple(named)
    if listing.summary["labels_are_numbers"] and listing.classes:
        return tuple(map(str, range(int(listing.classes[-1]) + 1))) if int(listing.classes[-1]) < 1_000_000 else ()
    return tuple(listing.classes)


def _save_manifest(manifest: Manifest, place: str) -> None:
    if not is_remote(place):
        save_manifest(manifest, local_path(place))
        return
    with files.writing(place) as file:
        here = Path(file.name).with_suffix(".json")
        save_manifest(replace(manifest, root=str(here.parent)), here)
        file.write(here.read_bytes())
        here.unlink()


def _write_duplicates(
    dest: str, journal: Path, listing: Listing, seed: int, headers: Headers, grey16: Grey16 | None
) -> tuple[int, dict[str, int]]:
    """How many there are; and of near ones, how many are so many bits apart."""
    count = 0
    near = []
    if (journal / "duplicates.bin").exists():
        with files.writing(files.join(dest, "duplicates.jsonl")) as lines:
            for duplicate, original, bits in duplicate_pairs(journal):
                line: dict[str, Any] = {"name": listing[duplicate].name, "same_as": listing[original].name}
                if bits >= 0:
                    line["bits"] = bits
                    near.append((duplicate, original, bits))
                lines.write(json.dumps(line).encode() + b"\n")
                count += 1
    if near:
        files.write(files.join(dest, NEAR_SHEET), pair_picture(listing, near, seed, headers, grey16))
    apart = Counter(bits for _, _, bits in near)
    return count, {str(bits): apart[bits] for bits in sorted(apart)}


def contact_sheet(
    dest: str, tars: Sequence[tuple[str, int]], classes: Sequence[str], seed: int, grey16: Grey16 | None = None
) -> bytes:
    """A PNG of images from all over the shards, with their classes: a look at it shows most mistakes."""
    ends = list(itertools.accumulate(samples for _, samples in tars))
    chosen = sorted(random.Random(seed).sample(range(ends[-1]), min(ends[-1], SHEET[0] * SHEET[1])))
    across = min(len(chosen), SHEET[0])
    font = caption_font()
    sheet = Image.new("RGB", (across * CELL, -(-len(chosen) // across) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, number in enumerate(chosen):
        tar, samples = tars[i := bisect.bisect(ends, number)]
        image, label = _sample(files.join(dest, tar), number - ends[i] + samples, grey16)
        thumbnail = ImageOps.contain(image, (CELL - 4, CELL - 4))
        x, y = cell % across * CELL, cell // across * (CELL + CAPTION)
        sheet.paste(thumbnail, (x + (CELL - thumbnail.width) // 2, y + (CELL - thumbnail.height) // 2))
        text = classes[int(label)] if label.isdecimal() and int(label) < len(classes) else label
        draw.text((x + CELL // 2, y + CELL), fitted(text, font, CELL - 4), fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _sample(tar: str, row: int, grey16: Grey16 | None = None) -> tuple[Image.Image, str]:
    """A picture (black when it does not decode: with --no_verify it may not) and its label, "" without one."""
    line = files.read(tar.removesuffix(".tar") + ".idx").decode().split("\n")[row + 1].split(" ")
    parts = {line[i]: (int(line[i + 1]), int(line[i + 2])) for i in range(0, len(line), 4)}
    label = _range(tar, *parts["cls"]).decode("utf-8", "replace").strip() if "cls" in parts else ""
    best = min((name for name in parts if image_rank(name) >= 0), key=image_rank, default=None)
    if best is not None:
        with contextlib.suppress(BadImage):
            encoded = np.frombuffer(_range(tar, *parts[best]), np.uint8)
            return picture(encoded, grey16=grey16, least_side=CELL), label
    return Image.new("RGB", (CELL, CELL)), label


def _range(place: str, offset: int, size: int) -> bytes:
    if is_remote(place):
        fs, path = files.file_system(place)
        return bytes(fs.cat_file(path, start=offset, end=offset + size))
    with local_path(place).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def table(counts: dict[str, Any], dest: str, seconds: float) -> str:
    """The closing table."""
    lines = [
        f"found       {counts['found']:>14,}",
        f"  packed    {counts['packed']:>14,}",
        f"  rejected  {counts['rejected']:>14,}" + ("  see rejected.jsonl" if counts["rejected"] else ""),
    ]
    for reason, count in counts["reasons"].items():
        lines.append(f"    {count:>22,}  {reason}; the first: {counts['first_rejected'][reason]}")
    lines += [f"  duplicates{counts['duplicates']:>14,}" + ("  see duplicates.jsonl" if counts["duplicates"] else "")]
    for bits, count in counts.get("bits_apart", {}).items():
        lines.append(f"    {count:>22,}  {bits} bits from an image that stays; pairs in {NEAR_SHEET}")
    if ignored := counts["ignored"]:
        lines.append(f"not images  {sum(ignored.values()):>14,}  ({listed_kinds(ignored)})")
    for kind, (count, example) in counts["remarks"].items():
        lines.append(f"note        {count:>14,}  {kind}; the first: {example}")
    lines.append(f"classes     {counts['classes']:>14,}")
    lines.append(
        f"bytes       {counts['image_bytes']:>14,}  ({counts['image_bytes'] / counts['packed']:,.0f} an image)"
    )
    for split, number in counts["shards"].items():
        place = files.join(dest, split).rstrip("/")
        lines.append(f"shards      {number:>14,}  {counts['samples'][split]:,} images in {place}")
    speed = counts["found"] / max(seconds, 1e-3)
    lines.append(f"seconds     {seconds:>14,.1f}  ({speed:,.{0 if speed > 10 else 1}f} images/s)")
    return "\n".join(lines)
