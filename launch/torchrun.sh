#!/usr/bin/env bash
# One machine: launch/torchrun.sh --config recipes/moco_v2_r50.yaml --data shards/photos --out runs/photos
# Several: the same line on each, with NODES, NODE (0, 1, ...) and HEAD (the first machine's address) set.
# Machines that come and go: the same line on each, with NODES=2:4 (fewest:most) and HEAD, without NODE. The ranks start
# again from the newest checkpoint whenever one comes or goes; the first machine has to stay.
#
# GPUS: processes on this machine (default: its GPUs; without any, one on the CPU). PORT: where the ranks meet (default:
# a free port on one machine, 29500 on several). RESTARTS: starts after a crash (default 3).
#
# SIGTERM, SIGINT and SIGUSR1 to this script go to the ranks, which save and end with 0. Sent to torchrun itself they
# do the same, but torchrun ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/torchrun ]; then PATH=$PWD/.venv/bin:$PATH; fi
fail() { echo "error: $*" >&2; exit 2; }
command -v torchrun >/dev/null || fail "no torchrun in .venv/bin or PATH: run 'make install' in $PWD first"

found=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
if [ "$found" = 0 ]; then export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true}; fi
gpus=${GPUS:-$((found > 0 ? found : 1))}

nodes=${NODES:-1}
head=${HEAD:-127.0.0.1}
if [ "$nodes" != 1 ] && [ -z "${HEAD:-}" ]; then fail "NODES=$nodes: set HEAD to the address of the first machine"; fi
# Prints the port when it is free; 0 stands for any.
free_port() {
    python3 -c '
import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(sys.argv[1])))
    print(s.getsockname()[1])' "$1" 2>/dev/null
}
port=${PORT:-29500}
if [ "$nodes" = 1 ]; then
    port=$(free_port "${PORT:-0}") || fail "PORT=${PORT:-0} is in use on this machine, or no port: leave PORT out"
fi
case $nodes in
    *:*)
        # Each round of ranks makes a store of its own: in torchrun's, ranks would find what the round before left.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        id=$(printf '%s ' "$@" | cksum | cut -d ' ' -f 1)  # two runs that meet at the same place stay apart
        meeting=(--rdzv_backend=c10d --rdzv_endpoint="$head:$port" --rdzv_id="$id")
        ;;
    *)
        node=${NODE:-0}
        if [ "$nodes" != 1 ] && [ "$node" = 0 ]; then
            free_port "$port" >/dev/null || fail "port $port is in use here: start all machines with another PORT=..."
        fi
        meeting=(--node_rank="$node" --master_addr="$head" --master_port="$port")
        ;;
esac

# torchrun would end at a hang-up that nohup asked to ignore.
signals=SIGTERM,SIGINT,SIGQUIT
if [ -z "$(trap -p HUP)" ]; then signals=$signals,SIGHUP; fi

torchrun --signals_to_handle="$signals" --nnodes="$nodes" "${meeting[@]}" --nproc_per_node="$gpus" \
    --max_restarts="${RESTARTS:-3}" train.py "$@" &
launcher=$!
trap 'pkill -USR1 --parent "$launcher" -f train.py || true' TERM INT USR1
# A trap ends `wait` early, with a code above 128: wait on while torchrun is there.
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break
done
exit "$code"
