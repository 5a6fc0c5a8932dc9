# shellcheck shell=bash
# Sourced by test.sh, quickstart.sh and setup_vm.sh: go to the repository root,
# make .venv there and install bcm_jax from this checkout. Does nothing the
# second time.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT" || exit

VENV_PYTHON=.venv/bin/python

# Prints the first Python >= 3.11 that can make virtual environments.
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
    die "$without_venv cannot make virtual environments: ensurepip is" \
      "missing. On Debian or Ubuntu: sudo apt install python3-venv"
  fi
  die "no Python >= 3.11 found (tried python3, python3.13, python3.12," \
    "python3.11): install one, or put it on PATH"
}

make_venv() {
  local python
  "$VENV_PYTHON" -c 'import pip' 2>/dev/null && return
  # --clear: what may be there is half made or has lost its Python.
  python=$(find_python) || exit
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# What an install depends on: where the checkout is and what it asks for.
fingerprint() {
  pwd
  cat setup.py pyproject.toml requirements.txt
}

# install_into_venv [EXTRA]: installs `-e .` or `-e .[EXTRA]` unless done.
install_into_venv() {
  local extra=${1:-} stamp now
  stamp=.venv/installed${extra:+-$extra}
  make_venv
  now=$(fingerprint | cksum)
  [[ -f $stamp && $(<"$stamp") == "$now" ]] && return
  say "installing bcm_jax${extra:+[$extra]} into .venv (up to 3.6 GB, minutes)"
  "$VENV_PYTHON" -m pip install --quiet -e ".${extra:+[$extra]}" ||
    die "pip could not install bcm_jax: see its message above"
  # An install with an extra is a plain one too.
  printf '%s\n' "$now" >.venv/installed
  printf '%s\n' "$now" >"$stamp"
}
