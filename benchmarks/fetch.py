"""The cost of fetching a GB: `python benchmarks/fetch.py`. CPU seconds, the server's apart, for HTTP and for S3.

Candidates in turn, each in a process of its own, against a server on loopback that answers ranged requests by sendfile:
ours as it is, the same with every range by fsspec (as it was before pipeline.sources.http_range), and obstore where it
is installed. They write into one file in memory that is there already, so that the file system costs the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, SHARDS = 128 << 20, 8
CANDIDATES = ("ours", "fsspec", "obstore")


def seconds_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fetcher(candidate: str, protocol: str, address: str) -> Callable[[str, int], None]:
    from pipeline.sources import http_range, remote

    place = f"{address}/data" if protocol == "http" else "s3://data"
    if candidate == "obstore":
        from obstore.store import HTTPStore, S3Store

        plain = {"allow_http": True}
        keys = {"access_key_id": "x", "secret_access_key": "x", "region": "us-east-1"}
        store = (
            HTTPStore(place, client_options=plain)
            if protocol == "http"
            else S3Store("data", endpoint=address, client_options=plain, **keys)
        )
        pool = ThreadPoolExecutor(remote.REQUESTS)

        def by_obstore(name: str, descriptor: int) -> None:
            def one(start: int) -> None:
                content = store.get_range(name, start=start, end=min(start + remote.RANGE, SIZE))
                http_range.write_at(descriptor, memoryview(content), start)

            list(pool.map(one, range(0, SIZE, remote.RANGE)))

        return by_obstore
    if candidate == "fsspec":
        remote._http_address = lambda url: ""
    ours = remote.Fetcher()
    return lambda name, descriptor: ours.fetch(f"{place}/{name}", SIZE, descriptor)


def child(candidate: str, protocol: str, address: str, server: int, output: Path) -> None:
    fetch = fetcher(candidate, protocol, address)
    descriptor = os.open(output, os.O_RDWR)
    fetch("0.tar", descriptor)  # connections, imports
    began, own, servers = time.perf_counter(), time.process_time(), seconds_of(server)
    for number in range(SHARDS):
        fetch(f"{number}.tar", descriptor)
    gigabytes = SHARDS * SIZE / 1e9
    spent = {
        "client_s_per_gb": (time.process_time() - own) / gigabytes,
        "server_s_per_gb": (seconds_of(server) - servers) / gigabytes,
        "gb_per_s": gigabytes / (time.perf_counter() - began),
    }
    print(json.dumps(spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        candidate, protocol, address, server, output = options.child
        child(candidate, protocol, address, int(server), Path(output))
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        folder, output = Path(memory) / "served" / "data", Path(memory) / "fetched"
        folder.mkdir(parents=True)
        for number in range(SHARDS):
            (folder / f"{number}.tar").write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
        output.write_bytes(bytes(SIZE))
        serve = [sys.executable, str(REPOSITORY / "benchmarks" / "servers.py"), "http", str(folder.parent), "0"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}"
            paths = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
            environment = os.environ | {"PYTHONPATH": paths, "AWS_ENDPOINT_URL": address}
            environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
            try:
                for round_number in range(options.rounds):
                    for protocol in ("http", "s3"):
                        for candidate in CANDIDATES:
                            given = [candidate, protocol, address, str(server.pid), str(output)]
                            command = [sys.executable, __file__, "--child", *given]
                            done = subprocess.run(command, env=environment, capture_output=True, text=True)
                            last = done.stdout.splitlines()[-1] if not done.returncode else done.stderr.splitlines()[-1]
                            print(f"round {round_number + 1}  {protocol:4}  {candidate:8} {last}", flush=True)
            finally:
                server.kill()


if __name__ == "__main__":
    main()
