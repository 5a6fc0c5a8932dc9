#!/usr/bin/env bash
# Sets up .venv, installs bcm_jax with its test extra and runs the tests.
#
#   launch/test.sh                    fast tests (not marked slow), on the CPU
#   launch/test.sh --all              all tests
#   launch/test.sh tests/methods -x   arguments are passed to pytest; paths are
#                                     relative to the repository root
#   JAX_PLATFORMS=cuda launch/test.sh
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv test

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# With paths, -k or -m slow tests are included.
selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
  selection=()
  shift
elif [[ " $* " =~ \ (tests|-k|-m) ]]; then
  selection=()
fi
# One process per core; the tests of a file run in one process, since they share
# fixtures.
exec "$VENV_PYTHON" -m pytest -n auto --dist loadfile "${selection[@]}" "$@"
