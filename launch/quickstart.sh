#!/usr/bin/env bash
# Makes .venv, installs bcm_jax and trains a bidirectional consistency model on
# the handwritten digits that scikit-learn ships, then samples and inverts.
#
#   launch/quickstart.sh                            into runs/digits
#   launch/quickstart.sh /tmp/digits --config.seed=1
#                            another folder; all other arguments go to main
set -euo pipefail

workdir=runs/digits
if (($#)) && [[ $1 != -* ]]; then
  # A relative folder is the caller's, so resolve it before leaving.
  [[ $1 == /* ]] && workdir=$1 || workdir=$PWD/$1
  shift
fi

# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv

"$VENV_PYTHON" -m bcm_jax.main --config=configs/digits.py \
  --workdir="$workdir" "$@"

printf '\nPictures and numbers of this run:\n'
find "$workdir" \( -name '*.png' -o -path '*/eval/*.json' \) -print | sort
printf 'More pictures:   %s\n' \
  "$VENV_PYTHON -m bcm_jax.main --workdir=$workdir --mode=sample"
