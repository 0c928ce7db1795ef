"""The names that a user gives to data: YAML source cards, and brace patterns. The data itself is not opened here.

A card lists sources with weights: of all images that training sees, each source contributes its weight's share.

    sources:
      - {data: in1m/train, weight: 1, name: in1m}        # a folder, relative to this card
      - {data: "s3://bucket/web/{00000..00999}.tar", weight: 3, name: web}
      - {data: "s3://public-bucket/photos", weight: 1, anonymous: true}    # read without credentials
      - {data: scans, weight: 1, grey16_range: [0, 4095]}    # black and white of 16-bit grey
    lanes: 8             # optional: how the samples are shuffled, see pipeline.reading.order
    chunk_shards: 4      # or: all
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.files import exists, is_remote, local_path
from pipeline.pixels.formats import Grey16, grey16_range
from pipeline.sources.remote import ANONYMOUS

LARGEST_WEIGHT = 1e100
DEEPEST = 20  # levels of lists and mappings in a card, which has three


class CardSource(NamedTuple):
    """A source of a card. weight: None where none of the card's sources has one. grey16_range: None for what its
    manifest says."""

    data: str
    weight: float | None
    name: str
    grey16_range: Grey16 | None = None


class Card(NamedTuple):
    """lanes, chunk_shards: None where the card leaves them to the defaults; chunk_shards 0: the whole lane ("all"
    in the card)."""

    sources: tuple[CardSource, ...]
    lanes: int | None
    chunk_shards: int | None


def read_card(path: Path) -> Card:
    """FileNotFoundError when there is no such card, ValueError saying which key is wrong and what would be right."""
    if not path.is_file():
        raise FileNotFoundError(f"no such card: {path}")
    content = _load_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise ValueError(f"{path}: a card is `sources:` and a list of `{{data: ..., weight: ..., name: ...}}`")
    _known_keys(content, {"sources", "lanes", "chunk_shards"}, str(path))
    entries = tuple(_entry(entry, path, f"{path}, source {i}") for i, entry in enumerate(content["sources"], 1))
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: the names {names} must differ: give each source a `name:`")
    weighted = sum(entry.weight is not None for entry in entries)
    if weighted not in (0, len(entries)):
        raise ValueError(
            f"{path}: {weighted} of {len(entries)} sources have a weight: give one to all or to none (then size counts)"
        )
    lanes = _whole_number(content.get("lanes"), f"{path}: lanes")
    chunk = content.get("chunk_shards")
    return Card(entries, lanes, 0 if chunk == "all" else _whole_number(chunk, f"{path}: chunk_shards"))


def _load_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        problem = _problem(yaml.parse(text, yaml.SafeLoader))
        content = None if problem else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for bytes that are no text, and for impossible dates
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if problem:
        raise ValueError(f"{path} is not a card: {problem}")
    return content


def _problem(events: Iterable[yaml.Event]) -> str:
    """Why a card's YAML is not loaded: a few hundred bytes of aliases of aliases take gigabytes when they are written
    out, and PyYAML's time grows with the square of the depth."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            return "it uses an alias (*name): write each source out"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            return "it is nested too deeply"
    return ""


def _entry(entry: Any, card: Path, where: str) -> CardSource:
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
        raise ValueError(f"{where}: needs `data:`, which is a folder, tars or a URL")
    _known_keys(entry, {"data", "weight", "name", "anonymous", "grey16_range"}, where)
    data = entry["data"]
    if not exists(card.parent / local_path(data)):
        data = os.path.expandvars(data)
        if "$" in data:
            raise ValueError(f"{where}: {data} names an environment variable that is not set")
    if not is_remote(data) and not data.startswith("pipe:"):  # which is refused later
        data = str(card.parent / local_path(data))
    if is_card(data):
        raise ValueError(f"{where}: {data} is a card itself; list its sources here instead")
    anonymous = entry.get("anonymous", False)
    if type(anonymous) is not bool or (anonymous and not is_remote(data)):
        raise ValueError(
            f"{where}: `anonymous: true` is for a URL such as s3://, which is then read without credentials"
        )
    if anonymous and not data.startswith(ANONYMOUS):
        data = ANONYMOUS + data
    weight, name = entry.get("weight"), entry.get("name", short_name(data))
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < LARGEST_WEIGHT):
        raise ValueError(
            f"{where}: weight {str(weight)[:40]} must be a number above 0; leave a source out by deleting its line"
        )
    if type(name) not in (str, int, float):
        raise ValueError(f"{where}: name must be a word, not {str(name)[:40]}")
    return CardSource(data, weight, str(name), grey16_range(entry.get("grey16_range"), f"{where}: grey16_range"))


def _known_keys(given: dict[Any, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(key) for key in given if key not in known):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _whole_number(value: Any, what: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{what} {value!r} must be a whole number from 1")
    return value


def is_card(data: str) -> bool:
    return data.endswith((".yaml", ".yml")) and not is_folder(data)


def is_folder(data: str) -> bool:
    """A folder may be named as anything else is: photos.tar, cards.yaml, [v2]."""
    return not is_remote(data) and exists(local_path(data)) and local_path(data).is_dir()


def is_pattern(data: str) -> bool:
    """Braces and *; locally also ? and [, which mean other things in a URL. A path that exists is no pattern."""
    if is_remote(data):
        return re.search(r"[*{]", data) is not None
    return re.search(r"[*{?\[]", data) is not None and not exists(local_path(data))


def is_tar(data: str) -> bool:
    return re.search(r"\.tar(\?|$)" if is_remote(data) else r"\.tar$", data) is not None and not is_folder(data)


def is_compressed(data: str) -> bool:
    return re.search(r"\.(tgz|tar\.(gz|bz2|xz|zst))(\?|$)", data) is not None and not is_folder(data)


def short_name(data: str) -> str:
    """The folder's name, for logs: `in1m` of `/data/in1m/{000..127}.tar`."""
    if is_folder(data):
        return local_path(data).name or data
    folder = re.sub(r"/[^/]*(\.tar(\?.*)?|[*{\[][^/]*)$", "", data.rstrip("/"))
    return folder.rpartition("/")[2] or data


def split_root(names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The deepest folder that all of the names are in, and the names below it."""
    parts = [name.split("/")[:-1] for name in names]
    depth = next((i for i, level in enumerate(zip(*parts)) if len(set(level)) > 1), min(map(len, parts)))
    if depth == 0:
        return ".", names
    if is_remote(names[0]) and depth < 3:
        raise ValueError(f"{names[0]} and {names[-1]} are in different places: list them as sources of a YAML card")
    root = "/".join(parts[0][:depth])
    return root or "/", [name[len(root) + 1 :] for name in names]
