#!/usr/bin/env bash
# Installs the code on a TPU VM, prepares the VM and, given ARGS, starts the
# run. queued_resource.sh uses it as startup script of the VMs, preceded by the
# settings and arguments, so it runs on every worker at every boot, also after a
# preemption. tpu_vm.sh sync runs it over ssh. It sources nothing, because the
# VM has no other code yet.
#
#   CODE=gs://BUCKET/code.tar.gz WORKDIR=DIR startup.sh ARGS...
#   CODE=/home/me/code.tar.gz startup.sh             without starting a run
#
# CODE is an archive of the repository; other settings as for setup_vm.sh and
# job.sh.
set -euo pipefail

main() {
  local root=${BCM_ROOT:-/opt/bcm_jax} archive
  # HOME is not set at boot.
  export HOME=${HOME:-/root}
  if [[ ${1:-} == --help ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    return
  fi
  if [[ ! ${CODE:-} ]]; then
    echo "error: CODE is not set; expected gs://... or a path of a tar.gz" >&2
    exit 65
  fi
  # Stops the job of an earlier call.
  systemctl stop bcm-job.service 2>/dev/null || true
  mkdir -p "$root"
  archive=$CODE
  if [[ $CODE == gs://* ]]; then
    archive=$(mktemp)
    gcloud storage cp "$CODE" "$archive"
  fi
  # Removes files of an older commit, but keeps the installed packages.
  find "$root" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf "$archive" -C "$root"
  # The run checks the devices itself.
  "$root/launch/setup_vm.sh" --install-python ${1:+--no-devices}
  if (($# == 0)); then
    echo "ready; no ARGS, so nothing is started" >&2
  elif [[ -e ${WORKDIR:?is not set}/DONE ]]; then
    echo "$WORKDIR/DONE exists: this run has finished" >&2
  else
    "$root/launch/job.sh" start "$@"
  fi
}

main "$@"
