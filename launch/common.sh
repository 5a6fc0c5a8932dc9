# shellcheck shell=bash
# Sourced by the scripts of launch/: messages, settings, dry runs and
# confirmations. Sourcing only defines names.

# shellcheck disable=SC2034  # Used by the scripts.
{
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # Exit statuses of bcm_jax.main and of the scripts, see README.md.
  EXIT_BAD_INPUT=65
  EXIT_PREEMPTED=75
  # Folder of the code on a TPU VM.
  REMOTE=/opt/bcm_jax
  # The settings of env.example.
  SETTINGS=(
    PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY SLICES
    CREATE_FLAGS BUCKET MOUNT GCSFUSE_DEB WORKDIR EXTRA
    JAX_COMPILATION_CACHE_DIR TFDS_DATA_DIR LIBTPU_INIT_ARGS XLA_FLAGS
    MAX_RESTARTS GRACE_SECS CLUSTER NAMESPACE IMAGE SERVICE_ACCOUNT QUEUE
    XPK_STORAGE
  )
  # Settings that the run itself needs, on any platform.
  RUN_SETTINGS=(
    WORKDIR JAX_COMPILATION_CACHE_DIR TFDS_DATA_DIR LIBTPU_INIT_ARGS
    XLA_FLAGS MAX_RESTARTS GRACE_SECS
  )
  # Settings that are lists of flags, on one or several lines.
  FLAG_SETTINGS=" CREATE_FLAGS LIBTPU_INIT_ARGS XLA_FLAGS "
}

say() { printf '%s\n' "$*" >&2; }

# die WORDS...: reports a failure that may be temporary.
die() {
  say "error: $*"
  exit 1
}

# bad_input WORDS...: reports bad input; a restart would fail again.
bad_input() {
  say "error: $*"
  exit "$EXIT_BAD_INPUT"
}

# Prints the help: the comment at the head of the running script.
usage() {
  local line
  while IFS= read -r line; do
    [[ $line == '#!'* || $line == '#SBATCH'* ]] && continue
    [[ $line == '#'* ]] || break
    line=${line#\#}
    printf '%s\n' "${line# }"
  done <"$0"
}

# parse ARGUMENTS...: sets DRY_RUN and YES, WORDS (arguments before --) and ARGS
# (arguments after it, for bcm_jax.main). Handles --help.
parse() {
  WORDS=() ARGS=()
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --yes) YES=1 ;;
      --)
        shift
        ARGS=("$@")
        return
        ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
}

# unknown WORD VERBS...: reports an unknown word and the expected ones.
unknown() {
  local problem=""
  [[ -z $1 ]] || problem="unknown word '$1'; "
  shift
  bad_input "${problem}expected one of: $* (see ${0##*/} --help)"
}

# load_env: reads launch/env, if it exists, and exports the settings.
# Environment variables override the file.
load_env() {
  local name overrides=() file=${BCM_ENV:-$ROOT/launch/env}
  for name in "${SETTINGS[@]}"; do
    [[ -z ${!name:-} ]] || overrides+=("$name=${!name}")
  done
  if [[ -f $file ]]; then
    # shellcheck source=/dev/null
    source "$file"
  fi
  for name in ${overrides[@]+"${overrides[@]}"}; do
    printf -v "${name%%=*}" '%s' "${name#*=}"
  done
  MOUNT=${MOUNT:-/mnt/bcm}
  SLICES=${SLICES:-1}
  MAX_RESTARTS=${MAX_RESTARTS:-5}
  GRACE_SECS=${GRACE_SECS:-120}
  for name in "${SETTINGS[@]}"; do
    [[ $FLAG_SETTINGS == *" $name "* || ${!name:-} != *[[:cntrl:]]* ]] ||
      bad_input "$name: got $(printf '%q' "${!name}"), expected one line" \
        "without control characters; correct it in launch/env or the" \
        "environment"
    # Unsets empty settings: some programs treat an empty XLA_FLAGS as a value.
    if [[ -n ${!name:-} ]]; then export "${name?}"; else unset "$name"; fi
  done
}

# use_workdir_of ARGUMENTS...: sets WORKDIR to the --workdir of bcm_jax.main's
# arguments, if they have one; the last one counts. HAS_WORKDIR is set if so.
use_workdir_of() {
  local word is_next=""
  HAS_WORKDIR=""
  for word in "$@"; do
    if [[ -n $is_next ]]; then
      WORKDIR=$word HAS_WORKDIR=1 is_next=""
      continue
    fi
    case $word in
      --) break ;;
      --workdir | -workdir) is_next=1 ;;
      --workdir=* | -workdir=*) WORKDIR=${word#*=} HAS_WORKDIR=1 ;;
    esac
  done
  export WORKDIR=${WORKDIR:-}
}

# need NAMES...: fails if a setting is missing.
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || bad_input "not set: ${missing[*]}; write them" \
    "into launch/env (described in launch/env.example) or export them"
}

# quoted WORDS...: prints a command, quoted for the shell.
quoted() {
  local word out="" quote="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,^-]+$ ]]; then
      word="'${word//\'/$quote}'"
    fi
    out+="${out:+ }$word"
  done
  printf '%s\n' "$out"
}

# run COMMAND...: runs a command, or prints it on stdout with --dry-run.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    quoted "$@"
  else
    say "+ $(quoted "$@")"
    "$@"
  fi
}

# confirm ACTION: asks for confirmation of a destructive action, unless --yes.
confirm() {
  local answer
  [[ -z ${DRY_RUN:-} && -z ${YES:-} ]] || return 0
  [[ -t 0 ]] || bad_input "$*: needs confirmation, but stdin is not a" \
    "terminal; pass --yes"
  read -r -p "$*? [y/N] " answer
  [[ $answer == [yY] || $answer == [yY]es ]] || die "not confirmed"
}

# run_environment: sets ENVIRONMENT, NAME=value of all run settings that are
# set. Values may have several lines.
run_environment() {
  local name
  ENVIRONMENT=()
  for name in "${RUN_SETTINGS[@]}"; do
    [[ -z ${!name:-} ]] || ENVIRONMENT+=("$name=${!name}")
  done
}

# Prints the names of the TPU VMs, one per slice.
nodes() {
  local i
  # shellcheck disable=SC2153  # NAME is a setting.
  if ((SLICES == 1)); then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s\n' "$NAME-$i"; done
  fi
}

# ssh_all COMMAND [WORKER]: runs it on all workers of all slices, or on WORKER.
ssh_all() {
  local node
  while IFS= read -r node; do
    # Otherwise gcloud would read the list of nodes from stdin.
    run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" \
      --worker="${2:-all}" --command="$1" </dev/null
  done < <(nodes)
}

# cloud: checks the settings of all gcloud commands; sets WHERE, their flags.
cloud() {
  need PROJECT ZONE NAME
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] ||
    bad_input "SLICES: got $SLICES, expected a whole number >= 1"
  WHERE=(--project="$PROJECT" --zone="$ZONE")
}

# capacity_flags: sets CAPACITY_FLAGS and CREATE_WORDS from the settings.
capacity_flags() {
  CAPACITY_FLAGS=()
  case ${CAPACITY:-} in
    "" | on-demand) ;;
    spot | reserved | guaranteed) CAPACITY_FLAGS=("--$CAPACITY") ;;
    *) bad_input "CAPACITY: got $CAPACITY, expected empty, on-demand, spot," \
      "reserved or guaranteed" ;;
  esac
  # Fails at the end of the input, which has no zero byte.
  read -r -d '' -a CREATE_WORDS <<<"${CREATE_FLAGS:-}" || true
}

# archive FILE [COMMIT]: writes committed code to FILE; sets COMMIT. So all
# workers get the same code, and a run can be traced to its commit.
archive() {
  COMMIT=$(git -C "$ROOT" rev-parse --short=12 "${2:-HEAD}") ||
    die "$ROOT: no git commit ${2:-HEAD}; workers get only committed code"
  if [[ -z ${2:-} &&
    -n $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
    bad_input "$ROOT: has changes that are not committed, which workers would" \
      "not get; commit them, or pass --commit=HEAD to ignore them"
  fi
  run git -C "$ROOT" archive --format=tar.gz --output="$1" "$COMMIT"
}
