#!/usr/bin/env bash
# Creates .venv, installs bcm_jax, trains a bidirectional consistency model on
# the handwritten digits of scikit-learn, then samples and inverts.
#
#   launch/quickstart.sh                            writes to runs/digits
#   launch/quickstart.sh /tmp/digits --config.seed=1
#                            another folder (also --workdir DIR); other
#                            arguments are passed to main
set -euo pipefail

# venv.sh changes to the root of the repository.
folder=$PWD
# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

if (($#)) && [[ $1 != -* ]]; then
  set -- --workdir="$1" "${@:2}"
fi
use_workdir_of "$@"
workdir=runs/digits
if [[ -n $HAS_WORKDIR ]]; then
  [[ $WORKDIR == /* ]] && workdir=$WORKDIR || workdir=$folder/$WORKDIR
fi
install_into_venv

# The last --workdir counts.
"$VENV_PYTHON" -m bcm_jax.main --config=configs/digits.py "$@" \
  --workdir="$workdir"

printf '\nImages and metrics of this run:\n'
find "$workdir" \( -name '*.png' -o -path '*/eval/*.json' \) -print | sort
printf 'More samples:   %s\n' \
  "$VENV_PYTHON -m bcm_jax.main --workdir=$workdir --mode=sample"
