#!/usr/bin/env bash
# End-to-end run on a folder of photos: prepares the dataset, trains a
# classifier for features and a small BCM, evaluates it, and renders the
# CIFAR-10 (JPEG) rows of docs/results.md. About an hour on two CPU cores.
#
#   benchmarks/cifar10_jpeg.sh PHOTOS [WORKDIR]
#
# PHOTOS has train/CLASS/*.jpg and test/CLASS/*.jpg, 32x32 or larger. Finished
# steps are skipped and an interrupted run is resumed.
set -euo pipefail
photos=$(realpath "${1:?PHOTOS: missing; give the folder of photos}")
work=$(realpath -m "${2:-runs/benchmark_cifar10_jpeg}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
data=$work/data/cifar10_jpeg
config=(--config=configs/cifar10_jpeg.py --config.data.path="$data")

[[ -f $data/dataset.json ]] ||
  "$python" -m bcm_jax.data.prepare "$photos" "$data" --size=32
[[ -f $work/classifier/classifier.json ]] ||
  "$python" -m bcm_jax.train_classifier "${config[@]}" \
    --out="$work/classifier" --name='CIFAR-10 (JPEG) ResNet'
"$python" -m bcm_jax.main "${config[@]}" --workdir="$work/run"
"$python" -m bcm_jax.main --workdir="$work/run" --mode=eval \
  --config.eval.features=classifier \
  --config.eval.features_path="$work/classifier" \
  --config.eval.samplers=onestep,ancestral@1.2 \
  --config.eval.num_samples=2000 --config.eval.seeds=0,1,2 \
  --config.eval.num_real_for_prdc=2000 \
  --config.eval.inversion_noise=0.03,0.07,0.15,0.3

newest=$(find "$work/run/eval" -name '*.json' | sort -V | tail -n 1)
mkdir -p docs/results
cp "$newest" docs/results/cifar10_jpeg.json
"$python" -m bcm_jax.main --mode=table --workdir=docs
