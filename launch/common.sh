# shellcheck shell=bash
# Sourced by the scripts here: messages, settings, dry runs, questions.
# Nothing happens on sourcing but that names are defined.

# shellcheck disable=SC2034  # These are for the scripts.
{
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # What bcm_jax.main ends with, see README.md; scripts end the same way.
  EXIT_BAD_INPUT=65
  EXIT_PREEMPTED=75
  # Where the code lies on a TPU VM.
  REMOTE=/opt/bcm_jax
  # The settings of env.example.
  SETTINGS=(
    PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY SLICES
    CREATE_FLAGS BUCKET MOUNT GCSFUSE_DEB WORKDIR EXTRA
    JAX_COMPILATION_CACHE_DIR TFDS_DATA_DIR LIBTPU_INIT_ARGS XLA_FLAGS
    MAX_RESTARTS GRACE_SECS CLUSTER NAMESPACE IMAGE SERVICE_ACCOUNT QUEUE
    XPK_STORAGE
  )
  # Those that the run itself needs, wherever it is.
  RUN_SETTINGS=(
    WORKDIR JAX_COMPILATION_CACHE_DIR TFDS_DATA_DIR LIBTPU_INIT_ARGS
    XLA_FLAGS MAX_RESTARTS GRACE_SECS
  )
}

say() { printf '%s\n' "$*" >&2; }

# die WORDS...: something failed that may work another time.
die() {
  say "error: $*"
  exit 1
}

# bad_input WORDS...: says what was wrong, and that starting again won't help.
bad_input() {
  say "error: $*"
  exit "$EXIT_BAD_INPUT"
}

# Prints the comment at the head of the running script: its help.
usage() {
  local line
  while IFS= read -r line; do
    [[ $line == '#!'* || $line == '#SBATCH'* ]] && continue
    [[ $line == '#'* ]] || break
    line=${line#\#}
    printf '%s\n' "${line# }"
  done <"$0"
}

# parse ARGUMENTS...: sets DRY_RUN and YES, WORDS (what stands before --) and
# ARGS (what stands behind it, for bcm_jax.main). Prints the help if asked to.
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

# unknown WORD VERBS...: ends with what was expected.
unknown() {
  local problem=""
  [[ -z $1 ]] || problem="unknown word '$1'; "
  shift
  bad_input "${problem}expected one of: $* (${0##*/} --help says more)"
}

# load_env: reads launch/env, if it is there, and exports the settings. What
# the environment says already wins.
load_env() {
  local name given=() file=${BCM_ENV:-$ROOT/launch/env}
  for name in "${SETTINGS[@]}"; do
    [[ -z ${!name:-} ]] || given+=("$name=${!name}")
  done
  if [[ -f $file ]]; then
    # shellcheck source=/dev/null
    source "$file"
  fi
  for name in ${given[@]+"${given[@]}"}; do
    printf -v "${name%%=*}" '%s' "${name#*=}"
  done
  MOUNT=${MOUNT:-/mnt/bcm}
  SLICES=${SLICES:-1}
  MAX_RESTARTS=${MAX_RESTARTS:-5}
  GRACE_SECS=${GRACE_SECS:-120}
  for name in "${SETTINGS[@]}"; do
    # An empty XLA_FLAGS and none are not the same to everybody.
    if [[ -n ${!name:-} ]]; then export "${name?}"; else unset "$name"; fi
  done
}

# need NAMES...: ends where a setting is missing.
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || bad_input "not set: ${missing[*]}; write them" \
    "into launch/env (launch/env.example says what they mean) or export them"
}

# quoted WORDS...: prints a command as one could type it.
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

# run COMMAND...: runs it, or with --dry-run prints it on stdout.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    quoted "$@"
  else
    say "+ $(quoted "$@")"
    "$@"
  fi
}

# confirm WHAT: asks before something is lost; --yes is an answer.
confirm() {
  local answer
  [[ -z ${DRY_RUN:-} && -z ${YES:-} ]] || return 0
  [[ -t 0 ]] || bad_input "refusing to $*: nobody can be asked, as stdin is" \
    "no terminal; pass --yes"
  read -r -p "$*? [y/N] " answer
  [[ $answer == [yY] || $answer == [yY]es ]] || die "not done"
}

# Prints NAME=value of the run's settings that are set, one a line.
run_environment() {
  local name
  for name in "${RUN_SETTINGS[@]}"; do
    [[ -z ${!name:-} ]] || printf '%s\n' "$name=${!name}"
  done
}

# Prints the names of the TPU VMs: one a slice.
nodes() {
  local i
  # shellcheck disable=SC2153  # NAME is a setting.
  if ((SLICES == 1)); then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s\n' "$NAME-$i"; done
  fi
}

# ssh_all COMMAND [WORKER]: runs it on all workers of all slices, or on one.
ssh_all() {
  local node
  while IFS= read -r node; do
    # gcloud would eat the list of nodes as its stdin.
    run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" \
      --worker="${2:-all}" --command="$1" </dev/null
  done < <(nodes)
}

# cloud: checks what every gcloud command needs; sets WHERE, its last words.
cloud() {
  need PROJECT ZONE NAME
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] ||
    bad_input "SLICES=$SLICES; expected a whole number from 1"
  WHERE=(--project="$PROJECT" --zone="$ZONE")
}

# capacity_flags: sets CAPACITY_FLAGS and CREATE_WORDS from the settings.
capacity_flags() {
  CAPACITY_FLAGS=()
  case ${CAPACITY:-} in
    "" | on-demand) ;;
    spot | reserved | guaranteed) CAPACITY_FLAGS=("--$CAPACITY") ;;
    *) bad_input "CAPACITY=$CAPACITY; expected nothing, on-demand, spot," \
      "reserved or guaranteed" ;;
  esac
  read -r -a CREATE_WORDS <<<"${CREATE_FLAGS:-}"
}

# archive FILE [COMMIT]: writes committed code to FILE; sets COMMIT. All workers
# get the same bytes, and a run can be traced to its commit.
archive() {
  COMMIT=$(git -C "$ROOT" rev-parse --short=12 "${2:-HEAD}") ||
    die "no git commit ${2:-HEAD} in $ROOT; workers get what is committed"
  if [[ -z ${2:-} &&
    -n $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
    bad_input "there are changes that are not committed, and workers get what" \
      "is; commit them, or pass --commit=HEAD to leave them out"
  fi
  run git -C "$ROOT" archive --format=tar.gz --output="$1" "$COMMIT"
}
