# shellcheck shell=bash
# Sourced by test.sh, quickstart.sh and setup_vm.sh: changes to the repository
# root, creates .venv there and installs bcm_jax from this checkout. Skips
# finished steps.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT" || exit

VENV_PYTHON=.venv/bin/python

# Prints the first Python >= 3.11 that can create virtual environments.
find_python() {
  local candidate without_venv=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null || continue
    # Debian and Ubuntu ship Python without ensurepip.
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    without_venv=${without_venv:-$candidate}
  done
  if [[ -n $without_venv ]]; then
    die "$without_venv: cannot create virtual environments without ensurepip;" \
      "on Debian or Ubuntu: sudo apt install python3-venv"
  fi
  die "no Python >= 3.11 found (tried python3, python3.13, python3.12," \
    "python3.11); install one, or add it to PATH"
}

make_venv() {
  local python
  "$VENV_PYTHON" -c 'import pip' 2>/dev/null && return
  # --clear: an existing .venv is incomplete or its Python has been removed.
  python=$(find_python) || exit
  say "creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# Inputs of the installation: path of the checkout and its requirements.
fingerprint() {
  pwd
  cat setup.py pyproject.toml requirements.txt
}

# install_into_venv [EXTRA]: installs `-e .` or `-e .[EXTRA]` if outdated.
install_into_venv() {
  local extra=${1:-} stamp now
  stamp=.venv/installed${extra:+-$extra}
  make_venv
  now=$(fingerprint | cksum)
  [[ -f $stamp && $(<"$stamp") == "$now" ]] && return
  say "installing bcm_jax${extra:+[$extra]} into .venv (up to 3.6 GB, minutes)"
  "$VENV_PYTHON" -m pip install --quiet -e ".${extra:+[$extra]}" ||
    die "pip could not install bcm_jax; see its message above"
  # An installation with an extra includes the plain one.
  printf '%s\n' "$now" >.venv/installed
  printf '%s\n' "$now" >"$stamp"
}
