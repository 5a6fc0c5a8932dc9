#!/usr/bin/env bash
# Makes .venv, installs bcm_jax with its test extra and runs every test.
#
#   launch/test.sh                    all tests, on the CPU
#   launch/test.sh tests/methods -x   arguments go to pytest; paths are
#                                     relative to the repository root
#   JAX_PLATFORMS=cuda launch/test.sh
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv test

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# One process a core; the tests of a file stay together and share its fixtures.
exec "$VENV_PYTHON" -m pytest -n auto --dist loadfile "$@"
