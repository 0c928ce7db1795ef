#!/usr/bin/env bash
# The main job on data that needs no download: an image folder becomes shards, shards train MoCo, kNN and a linear
# classifier judge. Everything after the first line is what a user would type on pictures of their own. Run it by
# `make demo`.
set -euo pipefail
cd "$(dirname "$0")"
if [ -e demo ] && [ ! -e demo/.made_by_make_demo ]; then
    echo "error: the folder demo was not made by \`make demo\`: move it away" >&2
    exit 2
fi
rm -rf demo/images demo/shards demo/run demo/views.png demo/neighbours.png demo/report.html
mkdir -p demo && touch demo/.made_by_make_demo

echo "== 1/7 pages of letters as an image folder"
python benchmarks/letters.py demo/images

echo "== 2/7 images -> WebDataset shards"
python pipeline/make_shards.py demo/images/train demo/shards/train --samples_per_shard 500
python pipeline/make_shards.py demo/images/val demo/shards/val

echo "== 3/7 what the encoder will see"
python -m pipeline.preview --data demo/shards/train --views cifar --image_size 48 --crop_min 0.3 --count 3 \
    --output demo/views.png

echo "== 4/7 MoCo pre-training, without a label"
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train.py --config recipes/letters.yaml --data demo/shards/train --out demo/run

echo "== 5/7 how good is it? kNN on held-out pages"
knn() { python -m transfer.knn --run demo/run --train demo/shards/train --val demo/shards/val "$@" | tail -n 1; }
trained=$(knn)
untrained=$(knn --untrained)
pixels=$(knn --pixels)

echo "== 6/7 a linear classifier on the frozen features"
linear() {
    python -m transfer.linear --run demo/run --train demo/shards/train --val demo/shards/val --epochs 20 "$@" | tail -n 1
}
linear_trained=$(linear)
linear_untrained=$(linear --untrained)

echo "== 7/7 nearest neighbours, and a page about the run"
python -m transfer.gallery --run demo/run --data demo/shards/val --output demo/neighbours.png
python -m transfer.report demo/run --output demo/report.html

python - "$trained" "$untrained" "$pixels" "$linear_trained" "$linear_untrained" <<'PYTHON'
import json, pathlib, statistics, sys
judged = [json.loads(line) for line in sys.argv[1:]]
knn, knn_untrained, pixels = (row["knn"] for row in judged[:3])
linear, linear_untrained = (row["linear"] for row in judged[3:])
log = [json.loads(line) for line in pathlib.Path("demo/run/metrics.jsonl").read_text().splitlines()]
speed = statistics.median(row["images_per_second"] for row in log if "images_per_second" in row)
print(f"""
accuracy on {judged[0]["val"]} held-out pages     kNN  linear
  trained encoder           {knn:6.1%}  {linear:6.1%}
  untrained encoder         {knn_untrained:6.1%}  {linear_untrained:6.1%}
  raw pixels                {pixels:6.1%}
training speed            {speed:8.0f} images/s (median)
pictures                  demo/views.png  demo/neighbours.png  demo/run/curves.png
the report                demo/report.html
the run                   demo/run  (tensorboard --logdir demo/run)""")
PYTHON
