"""Two sides, several seeds each: is the difference of their means more than chance makes? Nothing but arithmetic."""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
MOST_DEALS = 20_000  # all ways to deal the runs to the sides are tried up to so many, beyond it so many drawn ones


def welch(a: Values, b: Values) -> dict[str, float]:
    """mean(a) - mean(b) with its 95 % interval (Welch: the sides may spread differently), the p of no difference, and
    the true difference that eight of ten such experiments would call one."""
    means, spreads = (a.mean(), b.mean()), (a.var(ddof=1) / len(a), b.var(ddof=1) / len(b))
    error = math.sqrt(sum(spreads))
    if error == 0:
        raise ValueError(f"the {len(a)} and {len(b)} runs of a side are all alike: nothing to judge a difference by")
    freedom = sum(spreads) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(spreads, (a, b)))
    t = stats.t(freedom)
    return {
        "difference": float(means[0] - means[1]), "half_width": float(t.ppf(0.975) * error), "freedom": float(freedom),
        "p": float(2 * t.sf(abs(means[0] - means[1]) / error)),
        "detectable": float((t.ppf(0.975) + t.ppf(0.8)) * error),
    }  # fmt: skip


def paired(a: Values, b: Values) -> dict[str, float]:
    """As `welch`, of a[i] - b[i]: for runs that share something, as their first weights are. `flips_p`: the share of
    all ways to swap the two of a pair in which the mean difference is at least as large."""
    apart = a - b
    error = apart.std(ddof=1) / math.sqrt(len(apart))
    if error == 0:
        raise ValueError(f"the {len(apart)} pairs are all equally far apart: nothing to judge a difference by")
    t = stats.t(len(apart) - 1)
    signs = np.array(list(itertools.product((1, -1), repeat=len(apart))))
    flips_p = (np.abs(signs @ apart) >= abs(apart.sum()) * (1 - 1e-9)).mean()
    return {
        "difference": float(apart.mean()), "half_width": float(t.ppf(0.975) * error), "pairs": len(apart),
        "p": float(2 * t.sf(abs(apart.mean()) / error)), "flips_p": float(flips_p),
    }  # fmt: skip


def permutation_p(a: Values, b: Values, *, seed: int = 0) -> float:
    """The share of deals of the runs to two sides whose largest |t| over the columns is at least that of the true one.

    a [n, E], b [m, E], a row for each run. One column: a test of one figure. Several: of whole curves, in which no
    point is looked at alone, so that many points do not make a difference likelier. Nothing is assumed of how runs
    spread.
    """
    both, n = np.concatenate([a, b]), len(a)
    if math.comb(len(both), n) <= MOST_DEALS:
        deals = np.array(list(itertools.combinations(range(len(both)), n)))
    else:
        draw = np.random.default_rng(seed)
        deals = np.array([range(n), *(draw.permutation(len(both))[:n] for _ in range(MOST_DEALS))])
    chosen = np.zeros((len(deals), len(both)))
    np.put_along_axis(chosen, deals, 1.0, axis=1)
    true = np.abs(_t(np.arange(len(both))[None] < n, both)).max(axis=1)[0]
    found = np.abs(_t(chosen, both)).max(axis=1)
    return float((found >= true * (1 - 1e-9)).mean())


def _t(chosen: NDArray[Any], both: Values) -> Values:
    """Welch's t of each column for each deal: chosen [D, n+m], both [n+m, E] -> [D, E]."""
    sides = []
    for mask in (chosen.astype(np.float64), 1.0 - chosen):
        count = mask.sum(axis=1, keepdims=True)
        mean = mask @ both / count
        variance = (mask @ both**2 - count * mean**2) / (count - 1)
        sides.append((mean, np.maximum(variance, 1e-18) / count))
    (mean_a, error_a), (mean_b, error_b) = sides
    return np.asarray((mean_a - mean_b) / np.sqrt(error_a + error_b))


def by_chance(a: Values, b: Values, *, runs: int, apart: float) -> float:
    """How often the means of `runs` seeds a side would lie `apart` or more when the sides are the same, by the spread
    within a and within b."""
    freedom = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
    return float(2 * stats.t(freedom).sf(apart / (pooled * math.sqrt(2 / runs))))
