#!/usr/bin/env bash
# Prepares a machine: .venv with the exact versions of a lock file, bcm_jax from
# this checkout, and the mounted bucket. Skips finished steps, so it can run at
# every boot.
#
#   launch/setup_vm.sh                    a TPU VM (requirements-tpu.txt)
#   launch/setup_vm.sh --extra=cuda       a GPU machine (requirements-cuda.txt)
#   launch/setup_vm.sh --install-python   with apt, if Python is too old
#   launch/setup_vm.sh --no-devices       does not count devices at the end
#   launch/setup_vm.sh --check            only reports; exit status 1 if
#                                         anything is missing
#   launch/setup_vm.sh --dry-run          prints the commands
#
# Settings (environment or launch/env; see env.example): EXTRA is tpu or cuda.
# BUCKET is mounted on MOUNT by Cloud Storage FUSE; empty mounts nothing.
# GCSFUSE_DEB is a gs:// path of gcsfuse's Debian package, if apt does not have
# it. PYTHON is the interpreter for creating .venv.
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
  bad_input "EXTRA: got $extra, expected tpu or cuda"
stamp=.venv/installed-$extra-lock

as_root() {
  if ((EUID == 0)); then run "$@"; else run sudo "$@"; fi
}

# Checksum of the files that determine the installed packages; see install.
wanted() {
  { pwd && cat "$lock" setup.py pyproject.toml; } | cksum
}

installed() { [[ -f $stamp && $(<"$stamp") == "$(wanted)" ]]; }

mounted() { grep -qs " $MOUNT fuse" "${MOUNTS_FILE:-/proc/mounts}"; }

good_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# devices: prints the accelerators of this host. The hosts of a slice wait for
# each other, so it must run on all of them at about the same time.
devices() {
  timeout 300 "$VENV_PYTHON" -c 'import jax
local = jax.local_devices()
print(len(local), "devices on this host:", local[0].device_kind)' ||
    die "JAX found no devices within 300 s; on a slice all hosts must run" \
      "this together (tpu_vm.sh sync), and no run may be using the devices"
}

# report NAME COMMAND...: prints one line with the result of a check.
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
    # A subshell, because `devices` exits if it finds no devices.
    (devices) || result=1
  fi
  return "$result"
}

ensure_python() {
  [[ -z ${PYTHON:-} ]] || good_python "$PYTHON" ||
    bad_input "PYTHON: got $PYTHON, expected Python >= 3.11"
  # A subshell, because find_python exits if it finds no Python.
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
    die "pip could not install $lock; see its message above"
  run "$VENV_PYTHON" -m pip install --quiet --no-deps -e . ||
    die "pip could not install bcm_jax; see its message above"
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
    as_root apt-get install --yes gcsfuse || die "apt does not have gcsfuse;" \
      "upload its Debian package to the bucket and set GCSFUSE_DEB to its" \
      "gs:// path, or use a shared file system with an empty BUCKET"
  fi
}

mount_bucket() {
  if [[ -z ${BUCKET:-} ]] || mounted; then return; fi
  [[ $BUCKET != */* ]] ||
    bad_input "BUCKET: got $BUCKET, expected the bare name without gs:// or" \
      "folders"
  ensure_gcsfuse
  as_root mkdir -p "$MOUNT"
  # --implicit-dirs: shows folders without an object of their own.
  # allow_other: for all users. No metadata cache, because hosts wait for files
  # of other hosts. Checkpoints are committed by renaming their folder.
  local command=(gcsfuse --implicit-dirs -o allow_other
    --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$BUCKET" "$MOUNT")
  if [[ -d ${SYSTEMD_DIR:-/run/systemd/system} ]]; then
    # A separate service, so that it stops after the run has saved a checkpoint;
    # job.sh orders the two.
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
