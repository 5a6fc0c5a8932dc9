#!/usr/bin/env bash
# Runs a command and restarts it depending on its exit status:
#
#   launch/supervise.sh [OPTIONS] COMMAND ARGS...
#   launch/supervise.sh launch/run.sh --config=configs/digits.py --workdir=DIR
#
#   0      done: ends with 0
#   65     bad input: ends with 65, because a restart would fail again
#   75     preempted and saved: restarts immediately
#   other  crash: restarts after a pause, at most --max-restarts times in a row;
#          a run that lasted --healthy-secs resets the count
#
# SIGTERM and SIGINT (Ctrl-C) are forwarded as SIGTERM, on which a run saves a
# checkpoint; the command is then not restarted, and its status is passed on.
#
#   --max-restarts=N    consecutive restarts (MAX_RESTARTS, or 5)
#   --pause-secs=S      pause before the first restart after a crash (10);
#                       doubles with every restart, up to 600
#   --healthy-secs=S    see above (3600)
#   --pass-preempted    ends with 75 on 75, for schedulers that restart the job
#   --stopped-file=F    file for the exit status when it gives up, that is,
#                       without a signal and not with 0 or 75; removed at start
#   --dry-run           prints the command
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
load_env

# A preempted run that lasted less than BRIEF_SECS restarts only after a pause:
# the preemption may repeat.
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
    -*) bad_input "unknown option $1; see supervise.sh --help" ;;
    *) break ;;
  esac
  shift
done
(($#)) || bad_input "COMMAND: missing; expected COMMAND ARGS..."
for number in "$max_restarts" "$first_pause" "$healthy_secs"; do
  [[ $number =~ ^[0-9]+$ ]] ||
    bad_input "got '$number', expected a whole number (see supervise.sh --help)"
done

if [[ -n ${DRY_RUN:-} ]]; then
  quoted "$@"
  exit
fi

# signaled: empty, the child that got the signal, or 'none' if there was none.
child="" signaled=""
# Bash runs a trap only after the foreground command has ended, so long commands
# run in the background and are awaited.
forward_signal() {
  signaled=${child:-none}
  [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null || true
}
trap forward_signal TERM INT

# await: waits for the child, also across signals; sets `status`.
await() {
  # `wait` returns early on a signal, while the child still runs.
  while kill -0 "$child" 2>/dev/null; do
    # Forwards a signal that arrived between a start and `child=$!`.
    [[ -z $signaled || $signaled == "$child" ]] || forward_signal
    wait "$child" || true
  done
  status=0
  wait "$child" || status=$?
  child=""
}

# give_up STATUS: writes the stopped file and exits.
give_up() {
  if [[ -n $stopped_file ]]; then
    # A failure to write the file must not hide the status.
    mkdir -p "$(dirname "$stopped_file")" || true
    printf '%s\n' "$1" >"$stopped_file" || say "cannot write $stopped_file"
  fi
  exit "$1"
}

# rest SECONDS: sleeps until the time is over or a signal arrives.
rest() {
  [[ -z $signaled ]] || return 0
  sleep "$1" &
  child=$!
  local status
  await
}

[[ -z $stopped_file ]] || rm -f "$stopped_file"
restarts=0 pause=$first_pause status=0
while :; do
  started=$SECONDS
  # A background command ignores SIGINT, so it gets only the forwarded signal.
  "$@" &
  child=$!
  await
  lasted=$((SECONDS - started))
  case $status in
    0) exit 0 ;;
    "$EXIT_PREEMPTED") [[ -z $pass_preempted ]] || exit "$EXIT_PREEMPTED" ;;
  esac
  if [[ -n $signaled ]]; then
    say "stopped by a signal; the command ended with $status"
    exit "$status"
  fi
  if ((status == EXIT_BAD_INPUT)); then
    say "bad input (status 65): not restarted"
    give_up "$status"
  fi
  if ((lasted >= healthy_secs)); then
    restarts=0 pause=$first_pause
  fi
  if ((status == EXIT_PREEMPTED)); then
    if ((lasted >= BRIEF_SECS)); then
      say "preempted after $lasted s: restarting"
    else
      say "preempted after $lasted s: restarting in $first_pause s"
      rest "$first_pause"
    fi
  else
    if ((restarts >= max_restarts)); then
      say "status $status after $restarts restarts: giving up"
      give_up "$status"
    fi
    restarts=$((restarts + 1))
    say "status $status: restart $restarts of $max_restarts in $pause s"
    rest "$pause"
    pause=$((pause * 2 < LONGEST_PAUSE ? pause * 2 : LONGEST_PAUSE))
  fi
  if [[ -n $signaled ]]; then
    say "stopped by a signal between two runs"
    exit "$status"
  fi
done
