"""Runs train.py and other commands in forked processes: real ranks and real kills, without importing torch and DALI
once a process.

One JSON object a line on stdin, one a line back: {"arguments": [...], "ranks": 2, "log": FILE, "errors": FILE, "env":
{...}} starts ranks of train.py, or with "program": FILE of another one, and answers {"pids": [...]}; {"wait": [pids],
"timeout": seconds} answers {"codes": [...]}, null for what still runs. An item of "arguments" that is a list is one
rank's own value each. Without "errors" both streams go to "log".
"""

import contextlib
import json
import os
import runpy
import sys
import time
import traceback
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure
import nvidia.dali.plugin.numba
import timm

import recipe
import train
from pipeline.pixels.kernels_cpu import shape_setter

# A training imports these where it needs them: 2 s of the processor, which each of a few hundred children would take.
assert matplotlib and nvidia.dali.plugin.numba and timm
shape_setter(32)


def start(command: dict[str, Any]) -> list[int]:
    ranks, pids = command["ranks"], []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            child(command, rank)
        pids.append(pid)
    return pids


def child(command: dict[str, Any], rank: int) -> None:
    code = 1
    try:
        for descriptor, name in ((1, "log"), (2, "errors" if "errors" in command else "log")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ.update(command.get("env", {}))
        if command["ranks"] > 1:
            own = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": command["ranks"],
                "LOCAL_WORLD_SIZE": command["ranks"],
            }
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": command["port"]}
            os.environ.update({name: str(value) for name, value in own.items()})
        arguments = [item[rank] if isinstance(item, list) else item for item in command["arguments"]]
        if program := command.get("program"):
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
            code = 0
            return
        if limit := command.get("largest_file"):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if patch := command.get("patch"):
            exec(patch, {"rank": rank})
        train.main(recipe.parse(arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # a log on a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], timeout: float) -> list[int | None]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes.get(pid) for pid in pids]


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(json.dumps({"codes": wait(command["wait"], command["timeout"])}), flush=True)
    else:
        print(json.dumps({"pids": start(command)}), flush=True)
