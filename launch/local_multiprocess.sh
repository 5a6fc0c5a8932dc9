#!/usr/bin/env bash
# The same run in several processes on this machine, joined by explicit
# addresses on the loopback interface: what a pod does, without a pod.
#
#   launch/local_multiprocess.sh N ARGS...
#   launch/local_multiprocess.sh 2 --config=configs/digits.py --workdir=DIR
#   launch/local_multiprocess.sh --dry-run N ARGS...
#
# Runs launch/run.sh ARGS N times, on the CPU unless JAX_PLATFORMS says
# otherwise. Lines of process I begin with [I]. SIGTERM and SIGINT (Ctrl-C) go
# to all processes as SIGTERM, on which a run saves. To stop as a pod does when
# one host is told to go, send SIGTERM to one process: their numbers are in the
# first lines.
#
# Ends with 0 if all did, with 75 if they were preempted and saved, else with
# the status of the first one that went wrong. Once one has gone wrong the
# others get SIGTERM after PEER_SECS seconds (120) and SIGKILL after as many
# again: they may be waiting for it for ever.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  --help) usage && exit ;;
  --dry-run) DRY_RUN=1 && shift ;;
esac
count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] ||
  bad_input "'$count' is no number of processes; expected N ARGS..., N >= 1"
shift
peer_secs=${PEER_SECS:-120}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# Prints a port that nobody uses now.
free_port() {
  local python=${PYTHON:-$ROOT/.venv/bin/python}
  [[ -x $python ]] || python=python3
  "$python" -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])' || bad_input "no Python to find a free port with"
}

port=PORT
[[ -n ${DRY_RUN:-} ]] || port=$(free_port)

pids=()
# tell SIGNAL: to the processes that still run.
tell() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}
trap 'tell TERM' TERM INT

for ((i = 0; i < count; i++)); do
  command=("$ROOT/launch/run.sh" "$@" --coordinator="127.0.0.1:$port"
    --num_processes="$count" --process_id="$i")
  if [[ -n ${DRY_RUN:-} ]]; then
    quoted "JAX_PLATFORMS=$JAX_PLATFORMS" "${command[@]}"
    continue
  fi
  # Not through a pipe: $! must be the process that signals are meant for.
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
  # Polled, and not `wait -n`: that one cannot tell a signal from an end.
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
      tell KILL
    elif ((SECONDS - failed_at >= peer_secs)); then
      tell TERM
    fi
  fi
  sleep 0.2
done
if ((result == 0)) && [[ -n $preempted ]]; then result=$EXIT_PREEMPTED; fi
exit "$result"
