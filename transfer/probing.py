"""The worth of a set of features, from folders of features alone: kNN, linear classifiers with many and few labels.

Every function returns rows: {"protocol", "setting", "metric", "mean", "spread", "seeds"} and what else describes one;
`spread` is the standard deviation over seeds, None where there is one figure.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.progress import track
from transfer.embedding import Embedding, Floats
from transfer.knn import nearest, vote
from transfer.subsets import share_of_each_class, shots

LOGISTIC = "logistic regression"
MOST_STEPS = 1000  # of a classifier's solver
CHUNK = 16_384  # images
Row = dict[str, Any]
Labels = NDArray[np.int64]


def row(protocol: str, setting: str, metric: str, values: Sequence[float], **more: Any) -> Row:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    figures = {"mean": float(np.mean(values)), "spread": spread, "seeds": len(values)}
    return {"protocol": protocol, "setting": setting, "metric": metric} | figures | more


def unit_rows(features: Floats) -> torch.Tensor:
    """L2-normalised, in memory: fp32 [N, D]."""
    return torch.nn.functional.normalize(torch.tensor(np.asarray(features)), dim=1)


def knn_rows(
    train: Embedding,
    val: Embedding,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
    *,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Weighted kNN as in transfer.knn, for each k and temperature; k is cut to the number of training images."""
    ks = sorted({min(k, len(train.labels)) for k in neighbours})
    similarities, indices = nearest(unit_rows(train.features), unit_rows(val.features), ks[-1], device=device)
    labels = torch.from_numpy(train.labels)[indices]  # [M, k]
    truth = torch.from_numpy(val.labels)
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    rows = []
    for k in ks:
        for temperature in temperatures:
            predicted = vote(similarities[:, :k], labels[:, :k], classes, temperature)
            accuracy = float((predicted == truth).double().mean())
            setting = f"k {k}, temperature {temperature:g}"
            rows.append(row("kNN", setting, "top-1", [accuracy], k=k, temperature=temperature))
    return rows


def logistic_rows(
    train: Embedding,
    val: Embedding,
    *,
    shares: Sequence[float] = (1, 0.1, 0.01),
    shots_of_class: Sequence[int] = (1, 5, 10),
    seeds: int = 5,
    cost: float = 1.0,
    progress: bool = False,
) -> list[Row]:
    """Logistic regression (scikit-learn, L2, its C is `cost`) on parts of the training labels, top-1 on all of val.

    Features are standardised by mean and deviation of all training features. `shots_of_class`: so many images of each
    class. A class that has fewer gives all it has.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for low in range(0, len(train.features), CHUNK):
        scaler.partial_fit(train.features[low : low + CHUNK])
    of_val = scaler.transform(val.features)
    jobs: list[tuple[str, Callable[[int], NDArray[np.int64]], int]] = []
    for share in sorted(shares, reverse=True):
        name = "all labels" if share == 1 else f"{100 * share:g} % of the labels"
        of_share = functools.partial(share_of_each_class, train.labels, share)
        jobs += [(name, of_share, seed) for seed in range(seeds if share < 1 else 1)]
    for k in sorted(shots_of_class, reverse=True):
        jobs += [(f"{k}-shot", functools.partial(shots, train.labels, k), seed) for seed in range(seeds)]
    classes = len(np.unique(train.labels))
    rows = []
    accuracies: dict[str, list[float]] = {}
    images: dict[str, int] = {}
    unfinished: list[str] = []
    for name, draw, seed in track(jobs, "logistic regression" if progress else "", len(jobs), unit="fits"):
        chosen = draw(seed)
        classifier = LogisticRegression(C=cost, max_iter=MOST_STEPS)
        if not _fit(classifier, scaler.transform(train.features[chosen]), train.labels[chosen]):
            unfinished.append(name)
        accuracies.setdefault(name, []).append(float((classifier.predict(of_val) == val.labels).mean()))
        images[name] = len(chosen)
    _say_unfinished(unfinished)
    for name, values in accuracies.items():
        of_class = images[name] / classes
        rows.append(row(LOGISTIC, name, "top-1", values, images=images[name], labels_of_class=of_class))
    return rows


def logistic_settings(
    fed: dict[str, Any], train: str, val: str, *, shares: Sequence[float], shots: Sequence[int], seeds: int, cost: float
) -> dict[str, Any]:
    """Everything that makes other rows of `logistic_rows`, for the ledger. fed: what embedding.json says of encoder and
    images; train, val: fingerprints of the data."""
    names = ("encoder", "features", "image_size", "resize", "mean_std", "precision")
    about = {name: fed.get(name) for name in names} | {"shares": sorted(shares), "shots": sorted(shots)}
    return about | {"train": train, "val": val, "seeds": seeds, "cost": cost}


def figures_of(rows: Sequence[Row]) -> dict[str, Any]:
    """setting -> mean, and "setting, spread" where there is one."""
    figures = {each["setting"]: each["mean"] for each in rows}
    return figures | {f"{each['setting']}, spread": each["spread"] for each in rows if each["spread"] is not None}


def svm_rows(
    train: Embedding,
    val: Embedding,
    *,
    shots_of_class: Sequence[int] = (1, 5, 10),
    seeds: int = 5,
    cost: float = 1.0,
    progress: bool = False,
) -> list[Row]:
    """Low-shot linear SVMs on images with lists of labels (Goyal et al. 2019, as on VOC07): one for each class, mean
    average precision on val.

    L2-normalised features, squared hinge, positives weigh twice. k-shot: k images that have the class and (C - 1) k
    that have not. A class without a positive in train or val counts for nothing.
    """
    from sklearn.metrics import average_precision_score
    from sklearn.svm import LinearSVC

    assert train.label_lists is not None
    assert val.label_lists is not None
    classes = max(label for lists in (train.label_lists, val.label_lists) for each in lists for label in each) + 1
    truth, of_val = several_hot(train.label_lists, classes), several_hot(val.label_lists, classes)
    judged = [c for c in range(classes) if 0 < truth[:, c].sum() < len(truth) and of_val[:, c].any()]
    x, x_val = unit_rows(train.features).numpy(), unit_rows(val.features).numpy()
    jobs = [("all labels", 0, 0)] + [(f"{k}-shot", k, seed) for k in sorted(shots_of_class) for seed in range(seeds)]
    precisions: dict[str, list[float]] = {}
    unfinished: list[str] = []
    for name, k, seed in track(jobs, "SVM" if progress else "", len(jobs), unit="fits"):
        of_class = []
        for c in judged:
            chosen = few_with_and_without(truth[:, c], k, (classes - 1) * k, [seed, c]) if k else np.arange(len(truth))
            svm = LinearSVC(C=cost, class_weight={True: 2, False: 1}, max_iter=MOST_STEPS, random_state=seed)
            if not _fit(svm, x[chosen], truth[chosen, c]):
                unfinished.append(name)
            of_class.append(float(average_precision_score(of_val[:, c], svm.decision_function(x_val))))
        precisions.setdefault(name, []).append(float(np.mean(of_class)))
    _say_unfinished(unfinished)
    return [
        row("linear SVM", name, "mAP", values, classes=len(judged), labels_of_class=_shots_in(name))
        for name, values in precisions.items()
    ]


def _shots_in(name: str) -> int | None:
    return int(name.removesuffix("-shot")) if name.endswith("-shot") else None


def several_hot(lists: Sequence[Sequence[int]], classes: int) -> NDArray[np.bool_]:
    """Lists of labels as a table bool [N, C]."""
    table = np.zeros((len(lists), classes), bool)
    for i, labels in enumerate(lists):
        table[i, list(labels)] = True
    return table


def few_with_and_without(has: NDArray[np.bool_], k: int, without: int, seed: list[int]) -> NDArray[np.int64]:
    """Positions of k images that have the class and of `without` that have not, or all where there are fewer."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(has))[:k], rng.permutation(np.flatnonzero(~has))[:without]]
    return np.sort(np.concatenate(chosen))


def _fit(classifier: Any, x: Floats, y: NDArray[Any]) -> bool:
    """Whether the solver came to its end."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(x, y)
    return not any(issubclass(each.category, ConvergenceWarning) for each in caught)


def _say_unfinished(names: list[str]) -> None:
    if names:
        which = ", ".join(dict.fromkeys(names))
        print(f"note: {len(names)} fits stopped after {MOST_STEPS} steps of the solver: {which}", file=sys.stderr)
