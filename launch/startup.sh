#!/usr/bin/env bash
# Brings the code to a TPU VM, makes the VM ready and, given ARGS, starts the
# run. queued_resource.sh makes it the VM's startup script, with the settings
# and the arguments written in front; so it runs on every worker at every boot,
# also after the VM was preempted and created again. tpu_vm.sh sync runs it over
# ssh. It stands alone: there is no other code on the VM yet.
#
#   CODE=gs://BUCKET/code.tar.gz WORKDIR=DIR startup.sh ARGS...
#   CODE=/home/me/code.tar.gz startup.sh             without starting a run
#
# CODE is an archive of the repository. The other settings are those of
# setup_vm.sh and job.sh.
set -euo pipefail

main() {
  local root=${BCM_ROOT:-/opt/bcm_jax} archive
  # A boot has no home.
  export HOME=${HOME:-/root}
  if [[ ${1:-} == --help ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    return
  fi
  if [[ ! ${CODE:-} ]]; then
    echo "error: CODE is not set; expected gs://... or a path of a tar.gz" >&2
    exit 65
  fi
  # At boot a job of before the boot is gone; on a second call it may not be.
  systemctl stop bcm-job.service 2>/dev/null || true
  mkdir -p "$root"
  archive=$CODE
  if [[ $CODE == gs://* ]]; then
    archive=$(mktemp)
    gcloud storage cp "$CODE" "$archive"
  fi
  # What an older commit had and this one has not must go; packages may stay.
  find "$root" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf "$archive" -C "$root"
  # A run counts the devices itself.
  "$root/launch/setup_vm.sh" --install-python ${1:+--no-devices}
  if (($# == 0)); then
    echo "ready; nothing to run was given" >&2
  elif [[ -e ${WORKDIR:?is not set}/DONE ]]; then
    echo "$WORKDIR/DONE is there: this run has finished" >&2
  else
    "$root/launch/job.sh" start "$@"
  fi
}

main "$@"
