"""Local shards as bytes, and the shared cache: its bound, its locks, what a killed process leaves behind."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import REPOSITORY, cpu_environment

from pipeline.sources.cache import FOLDER, Cache
from pipeline.sources.scan import checksum_of
from pipeline.sources.storage import Storage


def test_reads_and_maps_what_is_there(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    shard = tmp_path / "a.tar"
    shard.write_bytes(content.tobytes())
    storage = Storage()
    np.testing.assert_array_equal(storage.open(str(shard), bytes=10_000), content)
    np.testing.assert_array_equal(storage.open(f"file://{shard}"), content)
    np.testing.assert_array_equal(storage.read(str(shard), 500, 100, bytes=10_000), content[500:600])
    view = storage.open(str(shard))[10:20]
    storage.close()
    shard.unlink()
    np.testing.assert_array_equal(view, content[10:20])  # a mapping outlives the file and the storage


@pytest.mark.parametrize("size, what", [(9_000, "cut short"), (11_000, "replaced or added to")])
def test_a_shard_of_another_size_than_its_manifest_says(tmp_path: Path, size: int, what: str) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(size))
    for access in (lambda s: s.open(str(shard), bytes=10_000), lambda s: s.read(str(shard), 0, 10, bytes=10_000)):
        with pytest.raises(ValueError, match=rf"{size:,} bytes.*10,000.*{what}"):
            access(Storage())


def test_a_shard_that_changes_while_it_is_used(tmp_path: Path) -> None:
    """Replaced by another, cut short in place, removed: each read says so, none kills the process."""
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(10_000))
    storage = Storage()
    storage.read(str(shard), 9_000, 1_000, bytes=10_000)
    os.truncate(shard, 5_000)
    with pytest.raises(ValueError, match="cut short"):
        storage.read(str(shard), 9_000, 1_000, bytes=10_000)
    with pytest.raises(ValueError, match="cut short"):
        storage.read(str(shard), 4_000, 2_000)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="no shard"):
        storage.read(str(shard), 0, 10, bytes=10_000)


@pytest.mark.process
def test_few_open_files(tmp_path: Path) -> None:
    """1,000 shards held mapped at once, and read, under `ulimit -n 64`."""
    for i in range(1000):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i % 251]) * 5000)
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pipeline.sources.storage import Storage
storage = Storage()
urls = [f"{tmp_path}/{{i}}.tar" for i in range(1000)]
held = [storage.open(url, bytes=5000) for url in urls]
assert all(view[4999] == i % 251 for i, view in enumerate(held))
assert all(storage.read(url, 4999, 1)[0] == i % 251 for i, url in enumerate(urls))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, env=cpu_environment(), timeout=60)


# --- the cache, over fsspec's file system in memory -------------------------------------------------------------------


@pytest.fixture
def memory() -> object:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    return filesystem


def put(memory: object, name: str, size: int = 1000) -> tuple[str, int, str]:
    content = np.random.default_rng(hash(name) % 1000).integers(0, 256, size, dtype=np.uint8)
    memory.pipe_file(f"/{name}", content.tobytes())  # type: ignore[attr-defined]
    return f"memory://{name}", size, checksum_of(content)


def cached(folder: Path) -> list[str]:
    return sorted(p.name.partition("-")[0] for p in (folder / FOLDER).iterdir() if p.suffix == ".tar")


def test_cache_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path: Path, memory: object) -> None:
    shards = [put(memory, f"{name}.tar") for name in "abcdef"]
    cache = Cache(tmp_path, 3500)
    for shard in shards[:3]:
        cache.fetch(*shard)
        time.sleep(0.01)
    cache.fetch(*shards[0])  # used again: now b is the oldest
    cache.fetch(*shards[3])
    assert cached(tmp_path) == ["a", "c", "d"]
    assert cache.fetches == 4
    with pytest.raises(ValueError, match=r"5,000 bytes.*3,500.*raise --cache_gb"):
        cache.fetch(*put(memory, "big.tar", 5000))
    assert cached(tmp_path) == ["a", "c", "d"]


def test_a_shard_that_is_removed_stays_readable_and_is_fetched_again(tmp_path: Path, memory: object) -> None:
    a, b = put(memory, "a.tar"), put(memory, "b.tar")
    storage = Storage(cache_dir=str(tmp_path), cache_bytes=1500)
    view = storage.open(a[0], bytes=a[1], checksum=a[2])
    before = view.copy()
    storage.read(b[0], 0, 10, bytes=b[1], checksum=b[2])
    assert cached(tmp_path) == ["b"]
    np.testing.assert_array_equal(view, before)
    np.testing.assert_array_equal(storage.read(a[0], 0, 1000, bytes=a[1], checksum=a[2]), before)
    assert storage.fetches == 3


def test_wrong_bytes_are_refused(tmp_path: Path, memory: object) -> None:
    url, size, checksum = put(memory, "a.tar")
    cache = Cache(tmp_path, 1 << 20)
    with pytest.raises(ValueError, match="checksum xxh3_64"):
        cache.fetch(url, size, "xxh3_64:0123456789abcdef")
    with pytest.raises(ValueError, match=r"1,000 bytes, its manifest says 2,000: it was cut short"):
        cache.fetch(url, 2000)
    with pytest.raises(ValueError, match=r"1,000 bytes, its manifest says 500: it was replaced"):
        cache.fetch(url, 500)
    with pytest.raises(FileNotFoundError, match="no such object"):
        cache.fetch("memory://none.tar", 500, checksum)
    assert list((tmp_path / FOLDER).glob("*.part")) == []
    assert cache.fetch(url, size, checksum) is not None


def test_threads_share_a_fetch(tmp_path: Path, memory: object) -> None:
    shards = [put(memory, f"{i}.tar", 100_000) for i in range(8)]
    storage = Storage(cache_dir=str(tmp_path))
    storage.prefetch(shards)
    expected = [memory.cat_file(url.removeprefix("memory:/")) for url, _, _ in shards]  # type: ignore[attr-defined]
    wrong: list[str] = []

    def use(order: np.ndarray) -> None:
        for i in order:
            url, size, checksum = shards[i]
            if storage.read(url, 0, size, bytes=size, checksum=checksum).tobytes() != expected[i]:
                wrong.append(url)

    threads = [threading.Thread(target=use, args=(np.random.default_rng(t).permutation(8),)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert storage.fetches == 8
    storage.close()


FETCH = """
import sys
from pathlib import Path
from pipeline.sources.cache import Cache
folder, url, size, checksum = sys.argv[1:]
print("ready", flush=True)
Cache(Path(folder), 100_000_000).fetch(url, int(size), checksum)
print("fetched", flush=True)
"""


@pytest.mark.slow
@pytest.mark.process
def test_killed_while_fetching(tmp_path: Path) -> None:
    """kill -9 in the middle leaves half a file; another process, waiting or later, ends up with the whole one."""
    root = tmp_path / "served"
    root.mkdir()
    content = np.random.default_rng(0).integers(0, 256, 30_000_000, dtype=np.uint8)
    (root / "a.tar").write_bytes(content.tobytes())
    server = [sys.executable, str(REPOSITORY / "benchmarks" / "servers.py"), "http", str(root), "0", "--latency", "0.7"]
    environment = cpu_environment()
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True, env=environment) as serving:
        try:
            assert serving.stdout is not None
            url = f"http://127.0.0.1:{int(serving.stdout.readline())}/a.tar"
            command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), url, "30000000", checksum_of(content)]
            pipes = {"cwd": REPOSITORY, "env": environment, "stdout": subprocess.PIPE, "text": True}
            first = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            part = wait_for(tmp_path / "cache" / FOLDER, "*.part")
            second = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            assert second.stdout.readline() == "ready\n"
            time.sleep(0.5)
            assert part.exists()
            first.send_signal(signal.SIGKILL)
            assert first.communicate()[0] == "ready\n"
            assert second.communicate(timeout=60)[0] == "fetched\n"
            (tar,) = (tmp_path / "cache" / FOLDER).glob("*.tar")
            assert tar.read_bytes() == content.tobytes()
            assert not part.exists()
        finally:
            serving.kill()


def wait_for(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in folder.glob(pattern):
            return path
        time.sleep(0.01)
    raise AssertionError(f"no {pattern} came in {folder}")


def test_what_a_killed_process_left_makes_room(tmp_path: Path, memory: object) -> None:
    cache = Cache(tmp_path, 2500)
    (tmp_path / FOLDER / "old-0123456789abcdef.part").write_bytes(bytes(2000))
    cache.fetch(*put(memory, "a.tar"))
    assert sorted(p.name for p in (tmp_path / FOLDER).glob("*.part")) == []


def test_nothing_of_the_users_is_removed(tmp_path: Path, memory: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Own tars where earlier versions kept theirs, and where the cache is now: they stay, and take no room from it."""
    for folder in ("shards", FOLDER):
        cache = Cache(tmp_path, 2500)
        (tmp_path / folder).mkdir(exist_ok=True)
        own = [tmp_path / folder / name for name in ("only-copy.tar", "photos-2024.part", "b-0123456789abcdef.tar.gz")]
        for file in own:
            file.write_bytes(bytes(2000))
        os.utime(own[0], (0, 0))
        for name in "abcd":
            cache.fetch(*put(memory, f"{name}.tar"))
        assert all(file.stat().st_size == 2000 for file in own)
        assert {"c", "d"} <= set(cached(tmp_path)) and not {"a", "b"} & {
            p.name.partition("-")[0] for p in (tmp_path / FOLDER).glob("*.tar") if len(p.stem) == 18
        }
    assert capsys.readouterr().err == ""  # no old cache there


def test_a_folder_that_the_cache_did_not_make_is_not_used(tmp_path: Path, memory: object) -> None:
    (tmp_path / FOLDER).mkdir()
    Cache(tmp_path, 2500)  # empty: nothing to lose
    (tmp_path / "own" / FOLDER).mkdir(parents=True)
    file = tmp_path / "own" / FOLDER / "a-0123456789abcdef.tar"
    file.write_bytes(bytes(10))
    with pytest.raises(ValueError, match=r"own/fetched-shards was not made by this program.*cache_dir"):
        Cache(tmp_path / "own", 2500)
    assert [p.name for p in (tmp_path / "own").rglob("*")] == [FOLDER, file.name]


def test_an_old_cache_is_named_once_and_kept(
    tmp_path: Path, memory: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("only-copy.tar", "a-0123456789abcdef.tar", "b-0123456789abcdef.tar"):
        (tmp_path / "shards" / name).write_bytes(bytes(3_000_000))
    for _ in range(2):
        Cache(tmp_path, 2500).fetch(*put(memory, "c.tar"))
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert f"{tmp_path}/shards holds 2 shards that an earlier version fetched, 0.006 GB" in said
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_what_is_asked_for_ahead_is_not_removed_for_it(tmp_path: Path, memory: object) -> None:
    shards = [put(memory, f"{name}.tar") for name in "abcd"]
    storage = Storage(cache_dir=str(tmp_path), cache_bytes=3500)
    for url, size, checksum in shards[:3]:
        storage.read(url, 0, 10, bytes=size, checksum=checksum)
        time.sleep(0.01)
    storage.prefetch([shards[0], shards[2], shards[3]])
    storage.read(shards[3][0], 0, 10, bytes=shards[3][1], checksum=shards[3][2])
    assert cached(tmp_path) == ["a", "c", "d"]  # b, though a was used longest ago
    storage.close()


@pytest.mark.slow
@pytest.mark.process
def test_the_loader_opens_few_files(tmp_path: Path, image_folder: Path) -> None:
    """Batches that touch 300 shards each, with 256 files allowed."""
    image = next(image_folder.rglob("*.jpg")).read_bytes()
    (tmp_path / "shards").mkdir()
    for i in range(300):
        with tarfile.open(tmp_path / "shards" / f"{i:03d}.tar", "w") as tar:
            for row in range(2):
                info = tarfile.TarInfo(f"{i}-{row}.jpg")
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pipeline.loader import Loader
from pipeline.sources.opening import open_source
loader = Loader(open_source({str(tmp_path / "shards")!r}, workers=1), batch_size=300, image_size=32, num_threads=1)
ids = {{int(i) for _ in range(loader.steps_per_epoch) for i in next(loader).sample_ids}}
assert ids == set(range(600)), len(ids)
loader.close()
"""
    environment = cpu_environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, env=environment, timeout=120)
