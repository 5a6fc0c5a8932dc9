#!/usr/bin/env bash
# Runs several processes on this machine, connected by explicit addresses on the
# loopback interface: a multi-host run without a pod.
#
#   launch/local_multiprocess.sh N ARGS...
#   launch/local_multiprocess.sh 2 --config=configs/digits.py --workdir=DIR
#   launch/local_multiprocess.sh --dry-run N ARGS...
#
# Runs launch/run.sh ARGS N times, on the CPU unless JAX_PLATFORMS is set. Lines
# of process I begin with [I]. SIGTERM and SIGINT (Ctrl-C) are sent to all
# processes as SIGTERM, on which a run saves a checkpoint. To simulate the
# preemption of one host, send SIGTERM to one process; the first lines print
# their process ids.
#
# Exit status: 0 if all processes end with 0, 75 if they were preempted and
# saved, otherwise the status of the first failed process. After a failure the
# others get SIGTERM after PEER_SECS seconds (120) and SIGKILL after the same
# time again, because they may wait for the failed one forever.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  --help) usage && exit ;;
  --dry-run) DRY_RUN=1 && shift ;;
esac
count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] ||
  bad_input "N: got '$count', expected a number of processes >= 1; pass N ARGS"
shift
peer_secs=${PEER_SECS:-120}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# Prints a free port.
free_port() {
  local python=${PYTHON:-$ROOT/.venv/bin/python}
  [[ -x $python ]] || python=python3
  "$python" -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])' || bad_input "PYTHON: not found; needed to find a" \
    "free port"
}

port=PORT
[[ -n ${DRY_RUN:-} ]] || port=$(free_port)

pids=()
# signal_all SIGNAL: sends it to all running processes.
signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}
trap 'signal_all TERM' TERM INT

for ((i = 0; i < count; i++)); do
  command=("$ROOT/launch/run.sh" "$@" --coordinator="127.0.0.1:$port"
    --num_processes="$count" --process_id="$i")
  if [[ -n ${DRY_RUN:-} ]]; then
    quoted "JAX_PLATFORMS=$JAX_PLATFORMS" "${command[@]}"
    continue
  fi
  # No pipe, so that $! is the process to signal.
  "${command[@]}" > >(
    trap '' TERM INT
    exec sed -u "s/^/[$i] /"
  ) 2>&1 &
  pids+=("$!")
  say "[$i] process $!"
done
[[ -z ${DRY_RUN:-} ]] || exit 0

result=0 preempted="" failed_at=""
while ((${#pids[@]})); do
  # Polls, because `wait -n` does not distinguish a signal from an exit.
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if ((status == EXIT_PREEMPTED)); then
      preempted=1
    elif ((status != 0 && result == 0)); then
      result=$status failed_at=$SECONDS
      say "process $pid ended with $status"
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  if [[ -n $failed_at ]]; then
    if ((SECONDS - failed_at >= 2 * peer_secs)); then
      signal_all KILL
    elif ((SECONDS - failed_at >= peer_secs)); then
      signal_all TERM
    fi
  fi
  sleep 0.2
done
if ((result == 0)) && [[ -n $preempted ]]; then result=$EXIT_PREEMPTED; fi
exit "$result"
