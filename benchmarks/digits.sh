#!/usr/bin/env bash
# Trains and evaluates four runs on the digits, about 10 minutes each on two CPU
# cores, and renders their rows of docs/results.md.
#
#   benchmarks/digits.sh [WORKDIR]       WORKDIR is runs/benchmark by default
#
# Existing runs are resumed, or only evaluated again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=${1:-runs/benchmark}
python=${PYTHON:-.venv/bin/python}

run() {
  local name=$1 config=$2
  shift 2
  "$python" -m bcm_jax.main --config="configs/$config.py" \
    --workdir="$work/$name" "$@"
  # The newest evaluation is the one of the last step.
  local newest
  newest=$(find "$work/$name/eval" -name '*.json' | sort -V | tail -n 1)
  mkdir -p docs/results
  cp "$newest" "docs/results/$name.json"
}

run digits digits
# The negative control: the same run without the bidirectional term.
run digits_no_soft_term digits --config.method.bidirectional_weight=0
run digits_ict digits_ict
run digits_bcm_finetune digits_bcm_finetune \
  --config.training.init_from="$work/digits_ict"

"$python" -m bcm_jax.main --mode=table --workdir=docs
