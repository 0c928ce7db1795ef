"""Remote shards from real servers on loopback, slow and flaky: nothing lost, nothing twice, every error clear."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import REPOSITORY, cpu_environment

from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options
from pipeline.reading.order import make_order
from pipeline.reading.reader import Reader
from pipeline.sources import remote
from pipeline.sources.cache import FOLDER
from pipeline.sources.check import Expected, check_shards, fresh_storage
from pipeline.sources.http_range import Connections, Declined
from pipeline.sources.index import read_index
from pipeline.sources.manifest import Source, load_manifest
from pipeline.sources.opening import open_source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage

Serve = Callable[..., str]


def counts(url: str) -> dict[str, int]:
    address = "/".join(url.split("/")[:3])
    with urllib.request.urlopen(f"{address}/__counts__") as answer:
        return json.loads(answer.read())


def images(source: Source, storage: Storage, *, prefetch: bool = True) -> list[bytes]:
    """Every image in order."""
    found = []
    for manifest in source.manifests:
        shards = [(manifest.shard_url(i), s.bytes, s.checksum) for i, s in enumerate(manifest.shards)]
        if prefetch:
            storage.prefetch([*shards, *(manifest.index_url(i) for i in range(len(shards)))])
        for i, (url, size, checksum) in enumerate(shards):
            text = storage.read_bytes(manifest.index_url(i))
            index = read_index(text, samples=manifest.shards[i].samples, size=size)
            for offset, length in zip(index.offsets.tolist(), index.sizes.tolist()):
                found.append(storage.read(url, offset, length, bytes=size, checksum=checksum).tobytes())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("latency", ["0.02", "0.1"])
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_nothing_lost_nothing_twice(serve: Serve, shards_dir: Path, tmp_path: Path, kind: str, latency: str) -> None:
    faults = ["--latency", latency, "--busy_every", "5", "--reset_every", "4", "--short_every", "3"]
    url = serve(kind, shards_dir, *faults)
    source = open_source(url, cache_dir=str(tmp_path / "cache"))
    local = open_source(str(shards_dir))
    assert source.fingerprint != ""
    assert source.manifests[0].shards == local.manifests[0].shards
    assert source.lanes == len(local.manifests[0].shards)  # streamed; the local one is shuffled as a whole
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    assert images(source, storage) == images(local, storage)
    assert storage.fetches == len(local.manifests[0].shards)
    told = counts(url if kind == "http" else os.environ["AWS_ENDPOINT_URL"])
    assert told["busy"] and told["reset"] and told["short"]
    storage.close()


def test_large_shards_come_in_ranges(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE", 1 << 16)
    content = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(content.tobytes())
    url = serve("http", tmp_path / "served", "--busy_every", "9", "--reset_every", "7", "--short_every", "5")
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(storage.open(f"{url}/a.tar", bytes=3_000_001), content)
    assert counts(url)["requests a.tar"] > 46
    storage.close()


def test_a_server_without_ranges(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE", 1 << 16)
    content = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(content.tobytes())
    url = serve("http", tmp_path / "served", "--no_ranges")
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(storage.open(f"{url}/a.tar", bytes=1_000_000), content)
    assert counts(url)["requests a.tar"] == 1
    storage.close()


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_other_peoples_remote_shards(serve: Serve, shards_dir: Path, tmp_path: Path, kind: str) -> None:
    """No manifest and no indexes there: each tar is fetched once, indexed, and used from the cache afterwards."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in shards_dir.glob("*.tar"):
        (bare / tar.name).write_bytes(tar.read_bytes())
    url = serve(kind, bare)
    local = load_manifest(shards_dir / "manifest.json")
    for data in (url, f"{url}/shard-{{000000..{len(local.shards) - 1:06d}}}.tar"):
        source = open_source(data, cache_dir=str(tmp_path / "cache"), progress=False)
        assert source.manifests[0].shards == local.shards
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    assert len(images(source, storage)) == local.samples
    assert storage.fetches == 0
    storage.close()


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_missing_index_of_a_remote_source_is_built_in_the_cache(
    serve: Serve, shards_dir: Path, tmp_path: Path, kind: str
) -> None:
    """As for a local source, and each shard is still fetched once; the manifest tells whether it is the right tar."""
    far = Path(shutil.copytree(shards_dir, tmp_path / "far"))
    whole = (far / "shard-000001.idx").read_bytes()
    (far / "shard-000001.idx").unlink()
    url, cache = serve(kind, far), str(tmp_path / "cache")
    source = open_source(url, cache_dir=cache)
    order = make_order(source, 20, 0)
    for fetches in (4, 0):
        storage = Storage(cache_dir=cache)
        reader = Reader(source, storage)
        seen = [int(i) for step in range(3) for i in reader.read(order.draw(0, step)).draw.sample_ids]
        assert sorted(seen) == list(range(60)) and storage.fetches == fetches
        reader.close()
        storage.close()
    (built,) = (tmp_path / "cache" / "indexes").iterdir()
    assert built.read_bytes() == whole
    expected = [
        Expected(m.shard_url(i), m.index_url(i), s.samples, s.bytes, s.checksum)
        for m in source.manifests
        for i, s in enumerate(m.shards)
    ]
    with fresh_storage(expected, cache) as storage:
        assert list(check_shards(expected, storage, workers=1, progress=False)) == []
    # A manifest that announces another number of samples for it.
    shards = list(source.manifests[0].shards)
    shards[1] = replace(shards[1], samples=14)
    storage = Storage(cache_dir=cache)
    with pytest.raises(ValueError, match=r"what is in .*shard-000001.tar has 15 samples, the manifest says 14"):
        read_index_text(replace(source.manifests[0], shards=tuple(shards)), 1, storage)
    storage.close()


def test_public_buckets(serve: Serve, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials: the error says how a public bucket is read, and so it is, as --data and in a card."""
    url, cache = serve("s3", shards_dir), str(tmp_path / "cache")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    remote._filesystem.cache_clear()
    with pytest.raises(ValueError, match=r"anonymous\+s3://data/\.\.\. .*AWS_ENDPOINT_URL.*REQUESTER_PAYS"):
        open_source(url, cache_dir=cache)
    card = tmp_path / "card.yaml"
    card.write_text(f"sources: [{{data: {url}, anonymous: true}}]")
    local, storage = open_source(str(shards_dir)), Storage(cache_dir=cache)
    for data in (f"anonymous+{url}", str(card), f"anonymous+{url}/shard-00000*.tar"):
        source = open_source(data, cache_dir=cache)
        assert source.manifests[0].shards == local.manifests[0].shards
        assert source.names == ("data",)
    assert images(source, storage) == images(local, storage)
    storage.close()
    make_shards(f"anonymous+{url}", str(tmp_path / "again"), options=Options(), num_workers=1)
    assert open_source(str(tmp_path / "again")).samples == local.samples


@pytest.mark.parametrize("kind", ["http", "s3", "anonymous+s3", "refused"])
def test_shards_come_over_plain_http(
    serve: Serve, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Those of S3 by a signed address; fsspec fetches them where that is not taken."""
    url = kind.removesuffix("s3") + serve("s3", shards_dir) if "s3" in kind else serve("http", shards_dir)
    taken, read_range = [], Connections.read_range

    def counted(self: Connections, address: str, *arguments: int) -> int:
        taken.append(address)
        if kind == "refused":
            raise Declined
        return read_range(self, address, *arguments)

    monkeypatch.setattr(Connections, "read_range", counted)
    source, storage = open_source(url, cache_dir=str(tmp_path / "cache")), Storage(cache_dir=str(tmp_path / "cache"))
    local = open_source(str(shards_dir))
    if kind != "refused":
        monkeypatch.setattr(type(remote.reading_from(url)[0]), "cat_file", lambda *_, **__: pytest.fail("by fsspec"))
        storage.read_bytes = lambda name: (shards_dir / name.rpartition("/")[2]).read_bytes()  # type: ignore[method-assign]
    assert images(source, storage, prefetch=False) == images(local, Storage())
    assert len(taken) == storage.fetches == len(local.manifests[0].shards)
    assert all(("Signature=" in address) == (kind == "s3") for address in taken)
    storage.close()


def test_a_proxy_is_for_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore goes through the proxy that the environment names, and so do the shards."""
    for name, value in [("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example:9000")
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    remote._filesystem.cache_clear()
    assert remote._http_address("s3://data/a.tar").startswith("https://store.example:9000/data/a.tar?")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert remote._http_address("s3://data/a.tar") == ""
    monkeypatch.setenv("no_proxy", "store.example")
    assert remote._http_address("s3://data/a.tar").startswith("https://store.example:9000/data/a.tar?")
    remote._filesystem.cache_clear()


def test_requester_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that the error names is fsspec's, which reads its environment once."""
    monkeypatch.setattr(fsspec.config, "conf", {})
    fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3_REQUESTER_PAYS": "true"})
    remote._filesystem.cache_clear()
    assert remote._filesystem("s3").req_kw == {"RequestPayer": "requester"}
    remote._filesystem.cache_clear()


def test_signed_urls(serve: Serve, shards_dir: Path, tmp_path: Path) -> None:
    """A query is part of the address and not of the index's name, which may be no longer than a file name."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shards_dir / "shard-000000.tar", bare / "a.tar")
    url = f"{serve('http', bare)}/a.tar?X-Signature={'0123456789' * 40}"
    source = open_source(url, cache_dir=str(tmp_path / "cache"), progress=False)
    assert source.samples == 15 and Path(source.manifests[0].index_url(0)).is_file()


def test_processes_share_a_cache(serve: Serve, shards_dir: Path, tmp_path: Path) -> None:
    """Three ranks on a machine read everything at once, in different orders: each byte is fetched once for all."""
    url = serve("http", shards_dir, "--latency", "0.05")
    program = f"""
import sys, numpy as np
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage
source = open_source({url!r}, cache_dir={str(tmp_path / "cache")!r})
storage, manifest = Storage(cache_dir={str(tmp_path / "cache")!r}), source.manifests[0]
order = np.random.default_rng(int(sys.argv[1])).permutation(len(manifest.shards))
shards = [(manifest.shard_url(i), manifest.shards[i].bytes, manifest.shards[i].checksum) for i in order]
storage.prefetch(shards)
for url, size, checksum in shards:
    storage.read(url, 0, 1000, bytes=size, checksum=checksum)
storage.close()
"""
    command = [sys.executable, "-c", program]
    ranks = [subprocess.Popen([*command, str(r)], cwd=REPOSITORY, env=cpu_environment()) for r in range(3)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0, 0]
    told = counts(url)
    for shard in load_manifest(shards_dir / "manifest.json").shards:
        assert told[f"bytes {shard.path}"] == shard.bytes


def test_clear_errors(serve: Serve, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TRIES", 2)
    cache = str(tmp_path / "cache")
    url = serve("http", shards_dir)
    manifest = open_source(url, cache_dir=cache).manifests[0]
    storage = Storage(cache_dir=cache)
    shard = manifest.shards[0]
    with pytest.raises(ValueError, match=r"checksum.*its manifest says"):
        storage.open(manifest.shard_url(0), bytes=shard.bytes, checksum="xxh3_64:0000000000000000")
    with pytest.raises(ValueError, match=r"its manifest says .*cut short"):
        storage.open(manifest.shard_url(0), bytes=shard.bytes + 512, checksum=shard.checksum)
    with pytest.raises(FileNotFoundError, match="no such object"):
        storage.read(f"{url}/none.tar", 0, 10)
    storage.close()
    with pytest.raises(ValueError, match="holds no shards"):
        open_source(f"{url}/none", cache_dir=cache)
    with pytest.raises(ValueError, match=r"raise --cache_gb, or set smaller `lanes`"):
        open_source(url, cache_dir=cache, cache_bytes=1000)
    with pytest.raises(OSError, match="given up after 2 tries"):
        open_source("http://127.0.0.1:9/x", cache_dir=cache)
    with pytest.raises(ValueError, match="not a kind of URL"):
        open_source("nonsense://x", cache_dir=cache)
    with pytest.raises(ValueError, match="commands are not run"):
        open_source("pipe:cat shard.tar", cache_dir=cache)


@pytest.mark.slow
def test_training_batches_are_those_of_the_local_shards(serve: Serve, shards_dir: Path, tmp_path: Path) -> None:
    """Two epochs through the loader from a slow and flaky server, with a cache that holds two of the four shards."""
    from pipeline.loader import Loader

    url = serve(
        "http", shards_dir, "--latency", "0.02", "--busy_every", "5", "--reset_every", "4", "--short_every", "3"
    )
    shards = load_manifest(shards_dir / "manifest.json").shards
    room = sum(s.bytes for s in shards) // 2 + 10_000
    batches = []
    for data in (url, str(shards_dir)):
        card = tmp_path / "card.yaml"
        card.write_text(f'sources: [{{data: "{data}"}}]\nlanes: 1\nchunk_shards: 1\n')
        cache = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": room}
        source = open_source(str(card), **cache)  # type: ignore[arg-type]
        loader = Loader(source, batch_size=6, image_size=32, num_threads=1, **cache)  # type: ignore[arg-type]
        batches.append([next(loader) for _ in range(2 * loader.steps_per_epoch)])
        loader.close()
    assert max(sum(p.stat().st_size for p in (tmp_path / "cache" / FOLDER).iterdir()), 1) <= room
    for far, near in zip(*batches, strict=True):
        assert far.sample_ids.tolist() == near.sample_ids.tolist()
        assert bool((far.query == near.query).all() and (far.key == near.key).all())
