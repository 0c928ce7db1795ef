"""--retry_failed tries once more to fetch the images that failed, and packs them into further shards of a finished
DEST.

The shards that are there, and their samples' places in the order of the manifest, stay as they are. While a retry is at
work its job.json holds the numbers of the images and the summary of what was there before; the new summary replaces
that one at the end.
"""

import json
import re
from typing import Any, NamedTuple

from pipeline import files
from pipeline.packing.collect import SUMMARY
from pipeline.packing.fetch import FAILED
from pipeline.packing.journal import JOURNAL
from pipeline.packing.plan import PlannedShard


class Retry(NamedTuple):
    numbers: list[int]  # of images, in the listing
    before: dict[str, Any]  # the summary of what was packed before
    first: int  # number of the first further shard


def begun_retry(dest: str) -> Retry | None:
    """The retry that is under way in `dest`, if there is one that has not come to its end."""
    place = files.join(dest, f"{JOURNAL}/job.json")
    state = json.loads(files.read(place)) if "job.json" in files.names(files.join(dest, JOURNAL)) else {}
    if "before" not in state or state["before"] != json.loads(files.read(files.join(dest, SUMMARY))):
        return None
    return Retry(**state)


def new_retry(dest: str, before: dict[str, Any]) -> Retry:
    folder = files.join(dest, _split(before)).rstrip("/")
    tars = [re.fullmatch(r"shard-(\d+)\.tar", name) for name in files.names(folder)]
    # After the highest number: shards of which nothing was left have left gaps.
    return Retry(failed_numbers(dest), before, 1 + max((int(tar[1]) for tar in tars if tar), default=-1))


def further(shards: list[PlannedShard], retry: Retry) -> list[PlannedShard]:
    """The shards with numbers that follow those before; what was held out stays as it is."""
    return [shard._replace(split=_split(retry.before), number=shard.number + retry.first) for shard in shards]


def _split(before: dict[str, Any]) -> str:
    return "train" if "train" in before["shards"] else ""


def failed_numbers(dest: str) -> list[int]:
    """The images that a finished packing could not fetch."""
    lines = [json.loads(line) for line in files.read(files.join(dest, "rejected.jsonl")).splitlines()]
    failed = [line for line in lines if line["reason"] in FAILED]
    if any("number" not in line for line in failed):
        raise ValueError(
            f"{dest} was packed by an earlier version, which did not write down which images it could not fetch: "
            "--retry_failed does not work with it; add --overwrite to make it anew"
        )
    return [line["number"] for line in failed]
