"""The report: complete, self-contained, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_folders import make_embedding
from PIL import Image

import checkpoint
import recipe as recipes
from pipeline.sources.opening import open_source
from transfer import arguments, chart, ledger, report
from transfer.load import load_encoder

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_run(folder: Path, data: Path | str, *, steps: int, lr: float = 0.03) -> Path:
    """What train.py leaves behind, without the training."""
    folder.mkdir(parents=True)
    r = recipes.Recipe(
        data=str(data), out=str(folder), arch="resnet18", dim=16, views="v1", image_size=32, lr=lr, knn_data=str(data)
    )
    recipes.save(r, folder / "recipe.yaml")
    rows = [
        {
            "step": s,
            "epoch": s / 40,
            "loss": 7 - s / steps,
            "lr": lr,
            "images_per_second": 90 + s % 7,
            "data_wait": 0.02,
        }
        for s in range(1, steps + 1)
    ] + [{"step": steps, "knn": 0.375}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = {"source": "photos", "shard": "shard-000001.tar", "key": "<script>alert(1)</script>", "reason": "truncated"}
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(bad | {"sample_id": i}) + "\n" for i in (3, 4, 4)))
    encoder = load_encoder(folder, untrained=True).encoder
    checkpoint.save(folder, {"encoder": encoder.state_dict(), "step": steps}, step=steps, keep=1)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, shards_dir: Path) -> Path:
    """Two runs of the same name, one whose data is still there and one whose data has moved."""
    root = tmp_path_factory.mktemp("report")
    first = make_run(root / "monday" / "photos", shards_dir, steps=500)
    rows = [{"epoch": e, "lr": lr, "top1": e * lr} for e in (1, 2) for lr in (0.1, 0.3)]  # as transfer.linear writes it
    (first / "linear").mkdir()
    (first / "linear" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = make_run(root / "tuesday" / "photos", "/nowhere/shards", steps=20, lr=0.06)
    about: dict[str, Any] = {"encoder": "e", "train": "abcdefghij", "val": "v", "lr": 0.1}
    for start, top1 in (("trained", 0.8125), ("untrained", 0.1)):
        found = ledger.entry("finetune", about, {"top1": top1, "top5": 1.0}, run="<b>run</b>", step=20, start=start)
        ledger.record(found | {"encoder": start}, str(second))
    source = open_source(str(shards_dir))
    here: dict[str, Any] = {"data": str(shards_dir), "fingerprint": source.fingerprint, "classes": source.classes}
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    make_embedding(root / "features", features, np.arange(60) % 3, **here)
    make_embedding(root / "moved", features, data="/nowhere/shards")
    folders = [root / "features", root / "moved"]
    return Path(report.write_report([first, second], root / "report.html", images=40, features=folders))


def test_a_loss_that_rises_at_first_is_explained_beside_its_curve(page: Path) -> None:
    card = re.search(r'id="chart-loss">(.*?)<svg', page.read_text())
    assert card is not None and "It rises at first: the queue begins as random keys" in card.group(1)


def references(html: str) -> list[str]:
    """Everything that a browser would go and fetch."""
    found = re.findall(r"""(?:src|href|srcset|poster|action|data)\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"url\(([^)]+)\)|@import\s+(\S+)", html)  # type: ignore[arg-type]
    return [str(f) for f in found if not str(f).startswith("data:image/png;base64,")]


def test_nothing_external(page: Path) -> None:
    html = page.read_text()
    assert references(html) == []
    assert "://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html, "what the data says is shown, not run"


def test_judgements_and_maps(page: Path) -> None:
    html = page.read_text()
    assert "81.2 %" in html and "top1 0.8125, top5 1" in html and "train abcdefgh, val v" in html
    assert html.count("untrained</td>") == 1 and ": none yet" in html  # of the first run, which has no ledger
    assert html.count("where their features lie") == 2 and "Map not drawn: the images of" in html  # alt and caption
    with Image.open(page.parent / "features" / "neighbours" / "map.png") as drawn:
        assert len(set(drawn.convert("RGB").get_flattened_data())) > 500
    assert not (page.parent / "moved" / "neighbours" / "map.png").exists()


def test_everything_is_there(page: Path) -> None:
    html = page.read_text()
    for words in (
        "monday/photos",
        "tuesday/photos",
        "37.5 %",
        "60.0 %",
        "images_per_second",
        "moco_momentum",
        "truncated",
    ):
        assert words in html, words
    assert "2 images" in html, "a bad sample met twice is one image"
    for field in ("loss", "lr", "knn", "images_per_second", "data_wait"):
        assert f'id="chart-{field}"' in html
    assert html.count('class="differs"') >= 2  # data and lr at least
    assert "no such folder: /nowhere/shards" in html, "what cannot be drawn is said"
    assert html.count("data:image/png;base64,") == 3  # views, neighbours and map of the run whose data is there


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.slow
@pytest.mark.process
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """The page as the browser understood it: pictures decoded, charts as wide as their cards, no request sent."""
    # The browser itself measures; the page has no script, so it is framed by one that has.
    probe = tmp_path / "probe.html"
    probe.write_text(
        page.read_text().replace(
            "</body>",
            """<script>addEventListener("load", () => {
const images = [...document.images].map(i => i.complete && i.naturalWidth > 100);
const charts = [...document.querySelectorAll(".card > svg")].map(s => s.getBoundingClientRect());
const wide = document.documentElement.scrollWidth > innerWidth;
const fetched = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length;
document.body.innerHTML = "<pre>" + JSON.stringify({images, wide, fetched,
  charts: charts.filter(c => c.width > 300 && c.height > 100).length}) + "</pre>"; })</script></body>""",
        )
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*more: str | Path) -> str:
        command = [str(BROWSER), *flags, *map(str, more)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    dom = browse("--window-size=1200,900", "--virtual-time-budget=10000", "--dump-dom", probe.as_uri())
    match = re.search(r"<pre>(.*?)</pre>", dom)
    assert match, dom[-2000:]
    measured = json.loads(match[1])
    assert measured == {"images": [True, True], "wide": False, "fetched": 0, "charts": 5}

    browse("--window-size=420,3000", f"--screenshot={tmp_path / 'phone.png'}", page.as_uri())
    with Image.open(tmp_path / "phone.png") as image:
        assert image.size == (420, 3000)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100


STRANGE = ["[1, 2]", "3", '"text"', "null", "{", "[" * 100_000, "\ufffe", "\0"]


@pytest.mark.parametrize(
    "line", [*STRANGE, '{"step": "x"}', '{"step": 1e999}', '{"loss": 1}', f'{{"step": 1{"0" * 400}}}']
)
def test_a_strange_line_in_metrics_is_one_line_that_names_the_file(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "run", "/nowhere", steps=5)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(f"{line}\n".encode() + b'{"step": 6}\n')
    with pytest.raises(ValueError, match=r"^line 7 of .*metrics\.jsonl is no JSON object with a step: .*$"):
        report.write_report([run], tmp_path / "r.html", images=0)


@pytest.mark.parametrize("line", [*STRANGE, "\udc80"])
def test_a_strange_line_in_quarantine_is_one_line_that_names_the_file(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "run", "/nowhere", steps=5)
    with (run / "quarantine.jsonl").open("ab") as file:
        file.write(f"{line}\n".encode(errors="surrogateescape") + b"{}\n")
    with pytest.raises(ValueError, match=r"^line 4 of .*quarantine\.jsonl is no JSON object: .*$"):
        report.write_report([run], tmp_path / "r.html", images=0)


def test_odd_values_in_a_runs_files_cost_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "/nowhere", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 6, "loss": "x", "knn": [1], "lr": 1{"0" * 400}, "accuracy": NaN}}\n{{"step": 7, "lo')
    with (run / "quarantine.jsonl").open("a") as file:
        file.write('{"source": [1], "key": {}, "reason": null}\n{"sou')
    (run / "linear").mkdir()
    (run / "linear" / "metrics.jsonl").write_text('{"top1": 0.25}\n{"top1": 0.5}\n{"to')
    text = report.write_report([run], tmp_path / "r.html", images=0).read_text()
    assert "3 images" in text and "50.0 %" in text


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "/nowhere", steps=5)
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--images", "0"])
    report.main(arguments.report())
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 5_000
    with pytest.raises(FileNotFoundError, match="other is not a run"):
        report.write_report([run, tmp_path / "other"], tmp_path / "r.html")


def test_names_tell_runs_apart() -> None:
    assert report.names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert report.names_of([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="twice"):
        report.names_of([Path("/a/x"), Path("/a/../a/x")])


def test_too_many_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="7 runs; between 1 and 6"):
        report.write_report([tmp_path / str(i) for i in range(7)], tmp_path / "r.html")


def test_ticks_and_numbers() -> None:
    assert chart.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert chart.ticks(6.1, 7.9) == pytest.approx([6, 6.5, 7, 7.5, 8])
    low, *_, high = chart.ticks(3, 3)
    assert low <= 3 <= high
    assert [chart.short(v) for v in (0, 0.06, 0.00012, 1250, 62500, 1.25e6)] == [
        "0",
        "0.06",
        "1.2e-4",
        "1250",
        "62.5k",
        "1.25M",
    ]


def test_thinning_keeps_the_mean_and_the_end() -> None:
    steps, values = list(range(1, 100_001)), [float(i % 2) for i in range(100_000)]
    thin_steps, thin_values = chart.thin(steps, values)
    assert len(thin_steps) == chart.POINTS
    assert thin_steps[-1] == 100_000
    assert all(0.49 < v < 0.51 for v in thin_values)
    assert chart.thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
