"""Labels that stand in the JSON file beside each image, under a key that the user names (`--label_key`)."""

import itertools
import json
from collections.abc import Iterable, Iterator

from pipeline.packing.fetch import fetch, sidecar_alone
from pipeline.packing.lists import as_label
from pipeline.packing.prepare import Rejected
from pipeline.packing.survey import ListedImage, Sidecar, Survey, last_part
from pipeline.sources.index import LABEL_EXTENSION

TOGETHER = 1024  # images whose JSON is read at a time


def labels_from_json(images: Iterable[ListedImage], key: str, survey: Survey) -> Iterator[ListedImage]:
    """The images with the value at `key` of their JSON as label; a list there is a list of labels.

    Their .cls, if they have any, are left out: numbers of another order. ValueError when no image has the key.
    """
    labelled = read = 0
    keys: dict[str, None] = {}  # of the first files, for the error
    iterator = iter(images)
    while group := list(itertools.islice(iterator, TOGETHER)):
        beside = [(image, sidecar) for image in group if (sidecar := _json_of(image)) is not None]
        contents = fetch(sidecar_alone(image, sidecar) for image, sidecar in beside)
        values = {}
        for (image, sidecar), content in zip(beside, contents):
            read += 1
            survey.progress.note = f"{read:,} JSON files read"
            survey.progress.advance(0)
            where = f"{image.name} ({sidecar.extension})"
            try:
                found = {} if isinstance(content, Rejected) else json.loads(content[0])
            except (ValueError, RecursionError):
                found = {}
                survey.remark("files beside images are no JSON", where)
            if isinstance(found, dict):
                keys.update(dict.fromkeys(found if len(keys) < 30 else ()))
                values[image.path, image.offset] = as_label(found.get(key), where)
        for image in group:
            label = values.get((image.path, image.offset))
            labelled += label is not None
            if label is None:
                survey.remark(f"images have no `{key}` in a JSON beside them, so no label", image.name)
            sidecars = [each for each in image.sidecars or () if each.extension != LABEL_EXTENSION]
            yield image._replace(label=label, sidecars=sidecars or None)
    if not labelled:
        there = f"which hold {', '.join(keys)}" if keys else "which hold no keys"
        raise ValueError(f"--label_key {key}: no image has it in its JSON; there are {read:,} such files, {there}")


def _json_of(image: ListedImage) -> Sidecar | None:
    """Its `a.json`, or the one JSON file that it has under another name."""
    found = [each for each in image.sidecars or () if last_part(each.extension) == "json"]
    plain = [each for each in found if each.extension.lower() == "json"]
    return plain[0] if plain else found[0] if len(found) == 1 else None
