#!/usr/bin/env bash
# The main job on data that needs no download: an image folder becomes shards, shards train MoCo, kNN judges.
# Everything after the first line is what a user would type on pictures of their own. Run it by `make demo`.
set -euo pipefail
cd "$(dirname "$0")"
if [ -e demo ] && [ ! -e demo/.made_by_make_demo ]; then
    echo "error: the folder demo was not made by \`make demo\`: move it away" >&2
    exit 2
fi
rm -rf demo/images demo/shards demo/run demo/views.png demo/neighbours.png
mkdir -p demo && touch demo/.made_by_make_demo

echo "== 1/6 scikit-learn's digits as an image folder"
python benchmarks/digits.py demo/images

echo "== 2/6 images -> WebDataset shards"
python pipeline/make_shards.py demo/images/train demo/shards/train --samples_per_shard 500
python pipeline/make_shards.py demo/images/val demo/shards/val

echo "== 3/6 what the encoder will see"
python -m pipeline.preview --data demo/shards/train --views cifar --image_size 32 --crop_min 0.5 \
    --output demo/views.png

echo "== 4/6 MoCo pre-training, without a label"
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train.py --config recipes/digits.yaml --data demo/shards/train --out demo/run

echo "== 5/6 how good is it? kNN on held-out digits"
judge() { python -m transfer.knn --run demo/run --train demo/shards/train --val demo/shards/val "$@" | tail -n 1; }
trained=$(judge)
untrained=$(judge --untrained)
pixels=$(judge --pixels)

echo "== 6/6 nearest neighbours"
python -m transfer.gallery --run demo/run --data demo/shards/val --output demo/neighbours.png

python - "$trained" "$untrained" "$pixels" <<'PYTHON'
import json, pathlib, statistics, sys
judged = [json.loads(line) for line in sys.argv[1:]]
trained, untrained, pixels = (row["knn"] for row in judged)
log = [json.loads(line) for line in pathlib.Path("demo/run/metrics.jsonl").read_text().splitlines()]
speed = statistics.median(row["images_per_second"] for row in log if "images_per_second" in row)
print(f"""
kNN accuracy on {judged[0]["val"]} held-out digits
  trained encoder    {trained:7.1%}
  untrained encoder  {untrained:7.1%}
  raw pixels         {pixels:7.1%}
training speed       {speed:7.0f} images/s (median)
pictures             demo/views.png  demo/neighbours.png  demo/run/curves.png
the run              demo/run  (tensorboard --logdir demo/run)""")
PYTHON
