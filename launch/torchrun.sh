#!/usr/bin/env bash
# One machine: launch/torchrun.sh --config recipes/moco_v2_r50.yaml --data shards/photos --out runs/photos
# Several: the same line on each, with NODES, NODE (0, 1, ...) and HEAD (the first machine's address) set.
# GPUS: processes here (default: the GPUs, or 1). PORT: of the rendezvous. RESTARTS: after a crash (default 3).
#
# SIGTERM, SIGINT and SIGUSR1 to this script go to the ranks, which save and end with 0. Sent to torchrun itself they
# do the same, but torchrun ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$gpus" = 0 ]; then gpus=1; fi

# torchrun would end at a hang-up that nohup asked to ignore.
signals=SIGTERM,SIGINT,SIGQUIT
if [ -z "$(trap -p HUP)" ]; then signals=$signals,SIGHUP; fi

torchrun --signals_to_handle="$signals" --nnodes="${NODES:-1}" --node_rank="${NODE:-0}" --master_addr="${HEAD:-127.0.0.1}" \
    --master_port="${PORT:-29500}" --nproc_per_node="$gpus" --max_restarts="${RESTARTS:-3}" train.py "$@" &
launcher=$!
trap 'pkill -USR1 --parent "$launcher" -f train.py || true' TERM INT USR1
# A trap ends `wait` early, with a code above 128: wait on while torchrun is there.
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break
done
exit "$code"
