#!/usr/bin/env bash
# Starts a command again as its exit status says:
#
#   launch/supervise.sh [OPTIONS] COMMAND ARGS...
#   launch/supervise.sh launch/run.sh --config=configs/digits.py --workdir=DIR
#
#   0      done: ends with 0
#   65     bad input: ends with 65, starting again would not help
#   75     preempted and saved: starts it again at once
#   other  a crash: starts it again after a pause, at most --max-restarts times
#          in a row; a run that lasted --healthy-secs starts the count anew
#
# SIGTERM and SIGINT (Ctrl-C) go to the command as SIGTERM, on which a run
# saves; then it is not started again, and its status passes.
#
#   --max-restarts=N    5, or MAX_RESTARTS
#   --pause-secs=S      before the first restart after a crash (10); doubles
#                       from restart to restart, up to 600
#   --healthy-secs=S    3600
#   --pass-preempted    ends with 75 on 75: somebody else starts the job again
#   --stopped-file=F    written, with the status, when it ends with neither 0
#                       nor 75 by its own decision; removed at the start
#   --dry-run           prints the command
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
load_env

# A preempted run that lasted less than this is not started again at once: it
# could be told to go over and over.
readonly BRIEF_SECS=10 LONGEST_PAUSE=600

max_restarts=$MAX_RESTARTS first_pause=10 healthy_secs=3600
pass_preempted="" stopped_file=""
while (($#)); do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --pause-secs=*) first_pause=${1#*=} ;;
    --healthy-secs=*) healthy_secs=${1#*=} ;;
    --pass-preempted) pass_preempted=1 ;;
    --stopped-file=*) stopped_file=${1#*=} ;;
    --) shift && break ;;
    -*) bad_input "unknown option $1; supervise.sh --help lists them" ;;
    *) break ;;
  esac
  shift
done
(($#)) || bad_input "no command to supervise; expected COMMAND ARGS..."
for number in "$max_restarts" "$first_pause" "$healthy_secs"; do
  [[ $number =~ ^[0-9]+$ ]] ||
    bad_input "'$number' is no whole number (supervise.sh --help)"
done

if [[ -n ${DRY_RUN:-} ]]; then
  quoted "$@"
  exit
fi

# told: empty, or the child that was told to go, or 'heard' while there is none.
child="" told=""
# Bash runs a trap only after the command in front has ended, so everything
# that lasts runs in the background, and is waited for.
pass_on() {
  told=${child:-heard}
  [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT

# await: waits for the child, also across signals; sets `status`.
await() {
  # `wait` returns early on a signal, while the child goes on.
  while kill -0 "$child" 2>/dev/null; do
    # A signal between a start and `child=$!` found nobody to tell.
    [[ -z $told || $told == "$child" ]] || pass_on
    wait "$child" || true
  done
  status=0
  wait "$child" || status=$?
  child=""
}

# give_up STATUS: ends for good, and leaves a note.
give_up() {
  if [[ -n $stopped_file ]]; then
    # A note that cannot be written must not hide the status.
    mkdir -p "$(dirname "$stopped_file")" || true
    printf '%s\n' "$1" >"$stopped_file" || say "cannot write $stopped_file"
  fi
  exit "$1"
}

# rest SECONDS: a pause that a signal ends.
rest() {
  [[ -z $told ]] || return 0
  sleep "$1" &
  child=$!
  local status
  await
}

[[ -z $stopped_file ]] || rm -f "$stopped_file"
restarts=0 pause=$first_pause status=0
while :; do
  started=$SECONDS
  # In the background a command ignores SIGINT, so that Ctrl-C reaches it once.
  "$@" &
  child=$!
  await
  lasted=$((SECONDS - started))
  case $status in
    0) exit 0 ;;
    "$EXIT_PREEMPTED") [[ -z $pass_preempted ]] || exit "$EXIT_PREEMPTED" ;;
  esac
  if [[ -n $told ]]; then
    say "told to stop; the command ended with $status"
    exit "$status"
  fi
  if ((status == EXIT_BAD_INPUT)); then
    say "bad input (status 65): not started again"
    give_up "$status"
  fi
  if ((lasted >= healthy_secs)); then
    restarts=0 pause=$first_pause
  fi
  if ((status == EXIT_PREEMPTED)); then
    if ((lasted >= BRIEF_SECS)); then
      say "preempted after $lasted s: starting again at once"
    else
      say "preempted after $lasted s: starting again in $first_pause s"
      rest "$first_pause"
    fi
  else
    if ((restarts >= max_restarts)); then
      say "status $status, and $restarts restarts did not help: giving up"
      give_up "$status"
    fi
    restarts=$((restarts + 1))
    say "status $status: restart $restarts of $max_restarts in $pause s"
    rest "$pause"
    pause=$((pause * 2 < LONGEST_PAUSE ? pause * 2 : LONGEST_PAUSE))
  fi
  if [[ -n $told ]]; then
    say "told to stop between two runs"
    exit "$status"
  fi
done
