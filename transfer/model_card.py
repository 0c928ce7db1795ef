"""An exported folder: weights, configurations, and the README.md that says what the encoder is and how it is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save as serialize
from torch import Tensor

from transfer import ledger
from transfer.curves import is_number, read_metrics
from transfer.load import LoadedEncoder, weights_hash
from transfer.provenance import KEY, WEIGHTS, tensors_hash


def folder_content(
    state: dict[str, Tensor],
    configurations: Mapping[str, dict[str, Any]],
    record: dict[str, Any],
    figures: dict[str, float],
    *,
    library: str,
    usage: str,
) -> dict[str, bytes]:
    """File name -> content: the tensors with their record, each configuration as JSON under its name, and the card."""
    record = record | {"weights": tensors_hash(state)}
    return {
        WEIGHTS: serialize(state, metadata={"format": "pt", KEY: json.dumps(record)}),
        **{name: json.dumps(content, indent=2).encode() for name, content in configurations.items()},
        "README.md": model_card(record, figures, library=library, usage=usage).encode(),
    }


def model_card(record: dict[str, Any], figures: dict[str, float], *, library: str, usage: str) -> str:
    """Markdown with the header that the Hugging Face hub reads. `figures` are those of `known_figures`; `usage` is
    Python."""
    header = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["moco", "self-supervised", "image-feature-extraction"],
    }
    recipe, fed = record["recipe"], record["input"]
    steps = f"{record['step']:,} steps" if record["step"] else "a number of steps that its file does not tell"
    lines = [
        f"# {recipe['arch']}, pre-trained with Momentum Contrast",
        "",
        f"A {recipe['arch']} trained without labels for {steps} ([MoCo](https://arxiv.org/abs/1911.05722), He et al. "
        f"2020), exported by {record['program']} {record['version']}. It gives features; it has no classifier.",
        "",
        "## Use",
        "",
        f"```python\n{usage}\n```",
        "",
        f"Images are resized to {fed['resize']} pixels on the short side (bilinear), cropped to {fed['image_size']} in "
        f"the centre, scaled to 0 to 1 and normalised with mean {fed['mean']} and std {fed['std']}.",
        "",
        "## Figures",
        "",
        *_table(figures),
        "",
        "## Training",
        "",
        f"- steps: {record['step'] or 'unknown'}",
        f"- fingerprint of the data: {record['data'] or 'unknown'}",
        f"- hash of the encoder: {record['encoder']}",
        f"- hash of the tensors in this folder: {record['weights']}",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).rstrip(),
        "```",
        "",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n".join(lines)


def _table(figures: dict[str, float]) -> list[str]:
    if not figures:
        return ["The run folder held none."]
    return ["| | |", "| --- | --- |", *(f"| {name} | {value:.6g} |" for name, value in figures.items())]


def known_figures(loaded: LoadedEncoder, folder: Path) -> dict[str, float]:
    """Reads what a run folder knows of the encoder: the last loss, kNN and RankMe of training up to its step, and the
    first figure of every judgement of its weights in the ledger. Empty where there is neither."""
    figures: dict[str, float] = {}
    rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    rows = [row for row in rows if row["step"] <= loaded.step]
    for name, said in (("loss", "loss"), ("knn", "kNN accuracy"), ("rankme", "RankMe")):
        if found := [row for row in rows if is_number(row.get(name))]:
            figures[f"{said}, step {found[-1]['step']:,}"] = float(found[-1][name])
    own = weights_hash(loaded.encoder.backbone)
    for entry in ledger.read(str(folder / ledger.LEDGER)):  # of two that are alike the later holds
        name, value = next(iter(entry["figures"].items()))
        if entry.get("encoder") == own and is_number(value):
            figures[f"{entry.get('protocol')}: {name}, on data {entry.get('val')}"] = float(value)
    return figures
