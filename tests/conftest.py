"""Fixtures for every test: small image folders made here, real photographs where present, real ranks."""

import ast
import contextlib
import functools
import gc
import multiprocessing.process
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor
    from training import Runs

hypothesis.settings.register_profile("whole", max_examples=60, deadline=None)
hypothesis.settings.register_profile("fast", max_examples=10, deadline=None)
hypothesis.settings.load_profile("whole")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("SHARED_DATA") or REPOSITORY.parent / "shared" / "data")


STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}  # audit events
BY_LIBRARIES = {"/sbin/ldconfig", "fc-list"}  # torch when imported; matplotlib the first time that it lists the fonts
PROCESS_FIXTURES = {"runs", "serve"}
Command = Callable[..., subprocess.CompletedProcess[str]]
_guarded = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="what `make check` runs: no test that starts processes or is marked slow, fewer examples of hypothesis, "
        "and encoders whose first weights come from numbers drawn once",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        hypothesis.settings.load_profile("fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
    if config.getoption("--fast"):
        left_out = [item for item in items if item.get_closest_marker("process") or item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """What was imported by now is never collected: each full collection of garbage walked through torch, for 0.2 s."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """`make check` leaves out the tests marked `process` because these are slow, so the mark has to be right: a test
    without it fails where it, or a fixture of it, starts a process. On a GPU Triton starts compilers."""
    global _guarded
    _guarded = not {"process", "gpu"} & set(item.keywords)
    try:
        return (yield)
    finally:
        _guarded = False


def _refuse_process(event: str, arguments: Any) -> None:
    if _guarded and event in STARTS and not BY_LIBRARIES & set(map(str, arguments)):
        pytest.fail(f"a test that is not marked `process` starts one: {event} {str(arguments)[:200]}")


def _start_seen(process: multiprocessing.process.BaseProcess) -> None:
    if _guarded:
        pytest.fail("a test that is not marked `process` starts one by multiprocessing")
    _start(process)


sys.addaudithook(_refuse_process)
_start = multiprocessing.process.BaseProcess.start
multiprocessing.process.BaseProcess.start = _start_seen  # type: ignore[method-assign]


@functools.cache
def normal_numbers() -> "Tensor":
    import torch

    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def from_block(usual: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    """In place of torch's Kaiming initialisation: the same spread, from numbers that were drawn before."""
    import torch
    from torch.nn import init

    def begin(
        tensor: "Tensor",
        a: float = 0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
        generator: object = None,
    ) -> "Tensor":
        if generator is not None or tensor.numel() < 1 << 14 or tensor.device.type != "cpu":
            return usual(tensor, a, mode, nonlinearity, generator=generator)
        std = init.calculate_gain(nonlinearity, a) / init._calculate_correct_fan(tensor, mode) ** 0.5
        pieces = tensor.detach().view(-1).split(1 << 19)
        for piece, start in zip(pieces, torch.randint(1 << 19, (len(pieces),)).tolist()):
            torch.mul(normal_numbers()[start : start + len(piece)], std, out=piece)
        return tensor

    return begin


@contextlib.contextmanager
def weights_from_a_block() -> Iterator[None]:
    """Large layers begin with numbers from a block, at a place that the seed decides: to draw eleven million for each
    of two hundred encoders took a fifth of `make check`. Not where the numbers themselves are tested (mark `initial`).
    """
    from torch.nn import init

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_"):
            patch.setattr(init, name, from_block(getattr(init, name)))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def photos(shared_data: Path) -> list[Path]:
    """Photographs at their native size, sorted by name."""
    return sorted((shared_data / "photos").glob("*.JPEG"))


@pytest.fixture(scope="session")
def troublesome(shared_data: Path) -> list[Path]:
    """Awkward, broken and hostile files."""
    return sorted(p for p in (shared_data / "troublesome").rglob("*") if p.is_file() and p.name != "MANIFEST.tsv")


def make_image_folder(root: Path, classes: int = 3, per_class: int = 20, side: int = 48) -> Path:
    """Writes class folders of small smooth pictures, JPEG and PNG, of differing sizes, the same every time."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        folder = root / f"class_{c}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            size = (side + int(rng.integers(0, 24)), side + int(rng.integers(0, 24)))
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            if i % 4 == 3:
                image.save(folder / f"image_{i:03d}.png")
            else:
                image.save(folder / f"image_{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 small images in three class folders."""
    return make_image_folder(tmp_path_factory.mktemp("images"))


@contextlib.contextmanager
def packing_here() -> Iterator[None]:
    """make_shards does its tasks one after the other in this process, without starting workers."""
    from pipeline.packing import workers

    def run(
        work: Callable[[Any], Any], tasks: Iterable[Any], check: Callable[[Any], None] | None = None, **_: Any
    ) -> None:
        for task in tasks:
            done = work(task)
            if check is not None:
                check(done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run", run)
        patch.setattr(workers, "warm_up", lambda: None)
        yield


@pytest.fixture(autouse=True)
def packs_here_unless_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    if "process" in request.keywords or "pipeline.packing.workers" not in sys.modules:
        yield
    else:
        with packing_here():
            yield


@pytest.fixture(scope="session")
def shards_dir(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` through make_shards: four shards of 15."""
    from pipeline.make_shards import make_shards
    from pipeline.packing.prepare import Options

    destination = tmp_path_factory.mktemp("made") / "shards"
    with packing_here():
        make_shards(str(image_folder), str(destination), options=Options(), samples_per_shard=15)
    return destination


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps that never happened: recipe and checkpoint, the weights differing from the initial ones."""
    import torch

    import checkpoint
    import recipe as recipes
    from transfer.load import load_encoder

    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    small = recipes.Recipe(data="unused", out="unused", arch="resnet18", dim=16, views="v1", image_size=32, seed=3)
    recipes.save(small, folder / "recipe.yaml")
    encoder = load_encoder(folder, untrained=True).encoder
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith("bn1.weight"):
                tensor.mul_(1.5)
    checkpoint.save(folder, {"encoder": encoder.state_dict(), "step": 7}, step=7, keep=1)
    return folder


@pytest.fixture(scope="session")
def runs() -> Iterator["Runs"]:
    """Starts trainings quickly: one process for all tests has imported torch and DALI, and forks them."""
    from training import Runs  # which imports this module

    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(runs: "Runs", shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first step to the last without any disturbance, nor kNN."""
    from training import log_of

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert runs.train(out, shards_dir, curves=True) == [0], log_of(out).read_text()
    return out


def commands() -> list[str]:
    """The modules that a user runs as `python -m MODULE`."""
    found = []
    for path in sorted([*REPOSITORY.glob("pipeline/*.py"), *REPOSITORY.glob("transfer/*.py")]):
        conditions = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if "__name__ == '__main__'" in conditions:
            found.append(f"{path.parent.name}.{path.stem}")
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: no GPU, one thread, the repository importable."""
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return env | extra


@pytest.fixture
def run_command(runs: "Runs", tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`run_command("transfer.knn", *arguments, ranks=2, timeout=120)` runs `python -m transfer.knn`, on so many ranks,
    forked from a process that has imported torch and DALI; a Path runs that file."""

    def run(program: str | Path, *arguments: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        path = program if isinstance(program, Path) else REPOSITORY / f"{program.replace('.', '/')}.py"
        return runs.command(path, arguments, tmp_path_factory.mktemp("command"), **how)

    return run


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`serve(kind, folder, *flags)` -> the folder's URL. kind: http or s3."""
    from pipeline.sources import remote

    def forget_file_systems() -> None:
        """Those made for a server that is gone would be used again for the next one's address."""
        import s3fs

        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    running = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in [("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")]:
        monkeypatch.setenv(f"AWS_{name}", value)

    def start(kind: str, folder: Path, *flags: str) -> str:
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "servers.py"), kind, str(folder), "0", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=cpu_environment())
        running.append(process)
        assert process.stdout is not None
        address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        if kind == "http":
            return address
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        forget_file_systems()
        return "s3://data"

    yield start
    for process in running:
        process.kill()
        process.communicate()
    forget_file_systems()


@pytest.fixture
def s3_address(serve: Callable[..., str]) -> Callable[[], str]:
    """The address of the s3 server that `serve` started, for its own pages."""
    return lambda: os.environ["AWS_ENDPOINT_URL"]
