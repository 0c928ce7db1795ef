"""The command transfer.detect, killed with -9 after its first checkpoint, then run again by two ranks: real processes,
forked so that torch is imported once. The arguments are OUT, a port, and those of the command."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import checkpoint
from transfer import dense_arguments, detect


def child(environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        detect.main(dense_arguments.detect())
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    out, port = Path(sys.argv.pop(1)), sys.argv.pop(1)
    pid = child({})
    while not checkpoint.list_steps(out):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before its first checkpoint"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and not (out / "finished").exists()
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = [child(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0], codes
