#!/usr/bin/env bash
# Entry point of every host: sets the environment, then execs python -m
# bcm_jax.main, so that Python gets the signals and its exit status is passed
# on. The same on a laptop, a TPU VM, a GKE pod and in a SLURM task.
#
#   launch/run.sh --config=configs/cifar10.py --workdir=DIR [--config.a.b=value]
#   launch/run.sh --dry-run ARGS...   prints the command
#   launch/run.sh -- --help           the flags of bcm_jax.main
#
# Settings (environment or launch/env; see env.example): WORKDIR is the default
# of --workdir. JAX_COMPILATION_CACHE_DIR is the persistent compilation cache,
# by default compile_cache next to the work directory. TFDS_DATA_DIR,
# LIBTPU_INIT_ARGS and XLA_FLAGS are passed on. PYTHON is the interpreter, by
# default that of .venv, or else python3.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  --help) usage && exit ;;
  --dry-run) DRY_RUN=1 && shift ;;
  --) shift ;;
esac

load_env

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$ROOT/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=$(command -v python3) ||
    bad_input "no Python: neither $ROOT/.venv nor python3 on PATH exists; run" \
      "launch/setup_vm.sh, or set PYTHON"
fi

use_workdir_of "$@"
workdir=$WORKDIR
if [[ -z $HAS_WORKDIR && -n $workdir ]]; then
  set -- "$@" --workdir="$workdir"
fi

if [[ -z ${JAX_COMPILATION_CACHE_DIR:-} ]]; then
  if [[ $workdir == */* ]]; then
    JAX_COMPILATION_CACHE_DIR=${workdir%/}
    JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR%/*}/compile_cache
  else
    JAX_COMPILATION_CACHE_DIR=${HOME:-/tmp}/.cache/bcm_jax/compile_cache
  fi
fi
export JAX_COMPILATION_CACHE_DIR
# Runs this checkout from any directory, also if another version is installed.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Unbuffered, so that the logs of a killed process are complete.
export PYTHONUNBUFFERED=1

if [[ -n ${DRY_RUN:-} ]]; then
  for name in JAX_COMPILATION_CACHE_DIR TFDS_DATA_DIR LIBTPU_INIT_ARGS \
    XLA_FLAGS; do
    [[ -z ${!name:-} ]] || quoted export "$name=${!name}"
  done
  quoted exec "$PYTHON" -m bcm_jax.main "$@"
  exit
fi
exec "$PYTHON" -m bcm_jax.main "$@"
