"""The judgement of bad_data.py on each file, from what came out of a system and from Pillow's truth."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 2.0  # levels of 255, mean over a whole image of 64 x 64: decoders and resizing filters differ by less
Truth = Mapping[int, np.ndarray | str]  # of each file its pixels, uint8 [S, S, 3], or why Pillow refuses it
Delivered = Mapping[int, Sequence[np.ndarray]]  # of each file all that came out as it

# All that can become of a file. Good ones first; "left out" is a file that Pillow refuses too.
OUTCOMES = (
    "right", "left out", "turned", "wrong", "bad, delivered", "lost, said", "lost", "exception", "signal", "hang",
    "memory",
)  # fmt: skip
ENDS = ("exception", "signal")  # the epoch


class Verdict(NamedTuple):
    """A run judged: what became of each awkward file, and of the good ones."""

    outcomes: dict[int, str]
    good_delivered: int
    good_wrong: int
    ended: str  # how, if not as it should


def compare(pixels: np.ndarray, truth: np.ndarray) -> str:
    """ "right", "turned" (right when it is turned or mirrored) or "wrong"."""

    def apart(other: np.ndarray) -> float:
        return float(np.abs(pixels.astype(np.int16) - other).mean())

    if apart(truth) <= TOLERANCE:
        return "right"
    turned = [np.rot90(side, turns) for side in (truth, truth[:, ::-1]) for turns in range(4)]
    return "turned" if min(map(apart, turned)) <= TOLERANCE else "wrong"


def of_file(number: int, truth: Truth, delivered: Delivered, said: Sequence[int]) -> str:
    """Says what became of a file in a run that went to its end. `said`: the files that the system named."""
    known = truth[number]
    copies = delivered.get(number, ())
    if isinstance(known, str):
        return "bad, delivered" if copies else "left out"
    if not copies:
        return "lost, said" if number in said else "lost"
    return max((compare(pixels, known) for pixels in copies), key=OUTCOMES.index)


def judge(awkward: Sequence[int], truth: Truth, delivered: Delivered, said: Sequence[int], ended: str) -> Verdict:
    """A run of all files of `truth`. Where it did not go to its end, the end is what became of an awkward file that was
    alone among good ones, and of those among several that did not come out."""
    how = ended.split()[0] if ended else ""
    outcomes = {number: of_file(number, truth, delivered, said) for number in awkward}
    if how:
        alone = len(awkward) == 1
        outcomes = {n: how if alone or n not in delivered else outcome for n, outcome in outcomes.items()}
    good = [number for number in truth if number not in set(awkward)]
    of_good = Counter(of_file(number, truth, delivered, said) for number in good)
    there = sum(number in delivered for number in good)
    return Verdict(outcomes, there, there - of_good["right"], ended)


def row(singly: Mapping[str, Verdict], beside: int) -> dict[str, Any]:
    """Counts over the runs of one awkward file each, by the file's name; `beside`: good ones in each run."""
    found = Counter(outcome for verdict in singly.values() for outcome in verdict.outcomes.values())
    lost = [beside - verdict.good_delivered for verdict in singly.values()]
    return {
        "crashes": sum(found[end] for end in ENDS),
        "signals": found["signal"],
        "hangs": found["hang"],
        "over_memory": found["memory"],
        "wrong_pixels": found["turned"] + found["wrong"],
        "turned": found["turned"],
        "lost": found["lost"] + found["lost, said"],
        "lost_silently": found["lost"],
        "bad_delivered": found["bad, delivered"],
        "right": found["right"],
        "bad_left_out": found["left out"],
        "good_lost": sum(lost),
        "good_lost_at_most": max(lost, default=0),
        "good_wrong": sum(verdict.good_wrong for verdict in singly.values()),
    }
