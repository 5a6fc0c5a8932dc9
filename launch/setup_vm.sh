#!/usr/bin/env bash
# Makes a machine ready to run: .venv with the exact versions of a lock file,
# bcm_jax from this checkout, and the bucket mounted. Does nothing the second
# time, so it can run at every boot.
#
#   launch/setup_vm.sh                    a TPU VM (requirements-tpu.txt)
#   launch/setup_vm.sh --extra=cuda       a GPU machine (requirements-cuda.txt)
#   launch/setup_vm.sh --install-python   with apt, where Python is too old
#   launch/setup_vm.sh --no-devices       does not count them at the end
#   launch/setup_vm.sh --check            only reports; ends with 1 if something
#                                         is missing
#   launch/setup_vm.sh --dry-run          prints what would be done
#
# Settings (environment or launch/env; see env.example): EXTRA is tpu or cuda.
# BUCKET is mounted on MOUNT by Cloud Storage FUSE; empty, nothing is mounted.
# GCSFUSE_DEB is a gs:// path to gcsfuse's Debian package, for where apt has
# none. PYTHON is the Python to make .venv with.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
parse "$@"
load_env

check="" install_python="" count_devices=1 extra=${EXTRA:-tpu}
for word in ${WORDS[@]+"${WORDS[@]}"}; do
  case $word in
    --check) check=1 ;;
    --install-python) install_python=1 ;;
    --no-devices) count_devices="" ;;
    --extra=*) extra=${word#*=} ;;
    *)
      unknown "$word" --check --install-python --no-devices --extra=tpu \
        --extra=cuda
      ;;
  esac
done
lock=launch/requirements-$extra.txt
[[ -f $lock ]] ||
  bad_input "EXTRA=$extra has no lock file; expected tpu or cuda"
stamp=.venv/installed-$extra-lock

as_root() {
  if ((EUID == 0)); then run "$@"; else run sudo "$@"; fi
}

# Of what the installed packages depend on; see install.
wanted() {
  { pwd && cat "$lock" setup.py pyproject.toml; } | cksum
}

installed() { [[ -f $stamp && $(<"$stamp") == "$(wanted)" ]]; }

mounted() { grep -qs " $MOUNT fuse" "${MOUNTS_FILE:-/proc/mounts}"; }

good_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# devices: what this host sees of the accelerators. The hosts of a slice wait
# for each other here, so all must ask at about the same time.
devices() {
  timeout 300 "$VENV_PYTHON" -c 'import jax
local = jax.local_devices()
print(len(local), "devices on this host:", local[0].device_kind)' ||
    die "JAX found no devices within 300 s; on a slice all hosts must ask" \
      "together (tpu_vm.sh sync), and no run may be using the devices"
}

# report NAME COMMAND...: one line, and whether it is there.
report() {
  local name=$1
  shift
  if "$@" >/dev/null 2>&1; then
    printf 'ok       %s\n' "$name"
  else
    printf 'MISSING  %s\n' "$name"
    return 1
  fi
}

check_all() {
  local result=0
  report "Python >= 3.11 in .venv" good_python "$VENV_PYTHON" || result=1
  report "packages of $lock" installed || result=1
  if [[ -n ${BUCKET:-} ]]; then
    report "bucket on $MOUNT" mounted || result=1
  fi
  if ((result == 0)); then
    # A subshell, as `devices` ends the shell when there are none.
    (devices) || result=1
  fi
  return "$result"
}

ensure_python() {
  [[ -z ${PYTHON:-} ]] || good_python "$PYTHON" ||
    bad_input "PYTHON=$PYTHON is not Python >= 3.11"
  # A subshell, as find_python ends the shell when it finds none.
  if [[ -n ${PYTHON:-} ]] || (find_python >/dev/null 2>&1); then return; fi
  [[ -n $install_python ]] || find_python >/dev/null
  as_root apt-get update
  as_root apt-get install --yes python3.11 python3.11-venv
}

install() {
  if installed; then return; fi
  if ! good_python "$VENV_PYTHON"; then
    if [[ -n ${PYTHON:-} ]]; then
      run "$PYTHON" -m venv --clear .venv
    elif [[ -n ${DRY_RUN:-} ]]; then
      quoted python3 -m venv --clear .venv
    else
      make_venv
    fi
  fi
  say "installing the packages of $lock into .venv (minutes)"
  run "$VENV_PYTHON" -m pip install --quiet -r "$lock" ||
    die "pip could not install $lock: see its message above"
  run "$VENV_PYTHON" -m pip install --quiet --no-deps -e . ||
    die "pip could not install bcm_jax: see its message above"
  [[ -n ${DRY_RUN:-} ]] || wanted >"$stamp"
}

ensure_gcsfuse() {
  local deb
  command -v gcsfuse >/dev/null && return
  if [[ -n ${GCSFUSE_DEB:-} ]]; then
    deb=/tmp/gcsfuse.deb
    run gcloud storage cp "$GCSFUSE_DEB" "$deb"
    as_root apt-get install --yes "$deb"
  else
    as_root apt-get install --yes gcsfuse || die "apt has no gcsfuse here;" \
      "put its Debian package into the bucket and its gs:// path into" \
      "GCSFUSE_DEB, or use a shared file system and leave BUCKET empty"
  fi
}

mount_bucket() {
  if [[ -z ${BUCKET:-} ]] || mounted; then return; fi
  [[ $BUCKET != */* ]] ||
    bad_input "BUCKET=$BUCKET; expected the bare name, without gs:// or folders"
  ensure_gcsfuse
  as_root mkdir -p "$MOUNT"
  # Folders of objects that nobody made as folders are to be seen too, by all
  # users. Hosts wait for files of other hosts, so nothing may be remembered. A
  # checkpoint becomes valid by renaming its folder.
  local command=(gcsfuse --implicit-dirs -o allow_other
    --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$BUCKET" "$MOUNT")
  if [[ -d ${SYSTEMD_DIR:-/run/systemd/system} ]]; then
    # A service of its own: at shutdown it ends after the run has saved, which
    # job.sh asks for.
    command=(systemd-run --unit=bcm-mount.service --collect
      --property=Type=forking "${command[@]}")
  fi
  as_root "${command[@]}"
}

if [[ -n $check ]]; then
  check_all
  exit
fi
ensure_python
install
mount_bucket
[[ -n ${DRY_RUN:-} || -z $count_devices ]] || devices
