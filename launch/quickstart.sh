#!/usr/bin/env bash
# Creates .venv, installs bcm_jax, trains a bidirectional consistency model on
# the handwritten digits of scikit-learn, then samples and inverts.
#
#   launch/quickstart.sh                            writes to runs/digits
#   launch/quickstart.sh /tmp/digits --config.seed=1
#                            another folder; other arguments are passed to main
set -euo pipefail

workdir=runs/digits
if (($#)) && [[ $1 != -* ]]; then
  # Resolves a relative folder before the change of directory.
  [[ $1 == /* ]] && workdir=$1 || workdir=$PWD/$1
  shift
fi

# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv

"$VENV_PYTHON" -m bcm_jax.main --config=configs/digits.py \
  --workdir="$workdir" "$@"

printf '\nImages and metrics of this run:\n'
find "$workdir" \( -name '*.png' -o -path '*/eval/*.json' \) -print | sort
printf 'More samples:   %s\n' \
  "$VENV_PYTHON -m bcm_jax.main --workdir=$workdir --mode=sample"
