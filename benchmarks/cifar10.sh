#!/usr/bin/env bash
# CIFAR-10 from end to end with the public commands: shards, MoCo, kNN on the 10,000 test images beside the untrained
# encoder and raw pixels, the linear protocol, curves and report.
#
#     bash benchmarks/cifar10.sh CIFAR WORK [flags of train.py]
#
# CIFAR holds train/CLASS/*.png and test/CLASS/*.png. Without further flags it is the reference demo (200 epochs of
# ResNet-18 with the small stem: for a GPU). benchmarks/results/cifar10_cpu.md is from two CPU cores, with
#     --small_stem false --batch_size 128 --bn_groups 4 --epochs 6 --log_every 20 --save_every 100
# The demo's 82.6 % is kNN on the head, the second of the four lines that kNN prints; the first is on the backbone.
# Running it again continues what was interrupted.
set -euo pipefail
cifar=$(realpath "$1") work=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

for part in train test; do
    [ -f "$work/shards/$part/manifest.json" ] || python pipeline/make_shards.py "$cifar/$part" "$work/shards/$part"
done
data=(--train "$work/shards/train" --val "$work/shards/test")

python train.py --config recipes/cifar10_r18.yaml --data "$work/shards/train" --out "$work/run" "$@"

for judged in "" "--features head" "--untrained" "--pixels"; do
    # shellcheck disable=SC2086 - no word at all when it is empty
    python -m transfer.knn --run "$work/run" "${data[@]}" $judged | tail -n 1 | tee -a "$work/knn.jsonl"
done
python -m transfer.linear --run "$work/run" "${data[@]}"
python -m transfer.gallery --run "$work/run" --data "$work/shards/test" --output "$work/gallery.png"
python -m transfer.report "$work/run"
