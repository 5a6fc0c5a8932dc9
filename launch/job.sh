#!/usr/bin/env bash
# Runs training as a systemd service of a TPU VM, so that it survives the end of
# the ssh connection and gets SIGTERM at shutdown. tpu_vm.sh and startup.sh call
# this on the VM, as root.
#
#   launch/job.sh start ARGS...   supervise.sh run.sh ARGS; stops an older job
#   launch/job.sh stop            SIGTERM: saves a checkpoint, ends with 75
#   launch/job.sh status
#   launch/job.sh logs [LINES|follow]
#   launch/job.sh --dry-run VERB...
#
# Settings (environment): WORKDIR and the others of env.example under "The run",
# MAX_RESTARTS, and GRACE_SECS (seconds between SIGTERM and SIGKILL).
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1 && shift; fi
load_env
unit=bcm-job.service

start() {
  local command
  use_workdir_of "$@"
  need WORKDIR
  run_environment
  command=("$ROOT/launch/supervise.sh" --stopped-file="$WORKDIR/STOPPED"
    "$ROOT/launch/run.sh" "$@")
  run systemctl stop "$unit" 2>/dev/null || true
  # systemd replaces $NAME in a command, and $$ by $.
  # mixed: SIGTERM to supervise.sh only, which forwards it; SIGKILL to all.
  # systemd stops units in reverse order, so After= keeps the bucket mounted
  # until the run has ended.
  run systemd-run --unit="$unit" --collect \
    --property=WorkingDirectory="$ROOT" \
    --property=KillMode=mixed \
    --property=TimeoutStopSec="$GRACE_SECS" \
    --property=After=bcm-mount.service \
    --property=RequiresMountsFor="$WORKDIR" \
    --setenv=HOME="${HOME:-/root}" \
    "${ENVIRONMENT[@]/#/--setenv=}" \
    "${command[@]//\$/\$\$}"
}

verb=${1:-}
(($# == 0)) || shift
case $verb in
  --help) usage ;;
  start) start "$@" ;;
  stop) run systemctl stop "$unit" ;;
  status) run systemctl status --no-pager "$unit" ;;
  logs)
    if [[ ${1:-} == follow ]]; then
      run journalctl --unit="$unit" --lines=100 --follow
    else
      run journalctl --unit="$unit" --lines="${1:-100}" --no-pager
    fi
    ;;
  *) unknown "$verb" start stop status logs ;;
esac
