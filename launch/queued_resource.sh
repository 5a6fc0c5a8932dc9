#!/usr/bin/env bash
# Runs on a queued resource, the usual way to get Spot TPUs. The startup script
# of the VMs starts the run, so it resumes when they are re-created.
#
#   launch/queued_resource.sh create -- --config=configs/cifar10.py [...]
#   launch/queued_resource.sh status           state and its initiator
#   launch/queued_resource.sh rerun            repeats the startup script on all
#                                              workers of an ACTIVE resource
#   launch/queued_resource.sh delete [--yes]   and its VMs; keeps the bucket
#
#   --dry-run          prints the commands and the startup script, runs none
#   --commit=COMMIT    create: this commit; by default HEAD, which fails if
#                      there are changes that are not committed
#   --json             status: complete output of gcloud
#
# create uploads the committed code to gs://BUCKET/code. A suspended resource
# does not become active again: delete and re-create it, or use babysit.sh.
# Logs: launch/tpu_vm.sh logs.
#
# Settings (environment or launch/env; see env.example): PROJECT, ZONE, NAME;
# create: ACCELERATOR_TYPE, RUNTIME_VERSION, CAPACITY, SLICES, CREATE_FLAGS,
# BUCKET, MOUNT, GCSFUSE_DEB, WORKDIR and the other settings of the run.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
load_env
verbs="create status rerun delete"

verb="" commit="" format='value(state.state,state.stateInitiator)'
for word in ${WORDS[@]+"${WORDS[@]}"}; do
  case $word in
    --json) format=json ;;
    --commit=*) commit=${word#*=} ;;
    *)
      [[ -z $verb ]] || unknown "$word" "one verb of $verbs"
      verb=$word
      ;;
  esac
done

# startup_script CODE: prints startup.sh, preceded by the settings and ARGS.
startup_script() {
  local setting
  printf '#!/usr/bin/env bash\n'
  quoted export "CODE=$1"
  for setting in BUCKET MOUNT GCSFUSE_DEB EXTRA; do
    [[ -z ${!setting:-} ]] || quoted export "$setting=${!setting}"
  done
  run_environment
  for setting in "${ENVIRONMENT[@]}"; do
    quoted export "$setting"
  done
  quoted set -- "${ARGS[@]}"
  sed 1d "$ROOT/launch/startup.sh"
}

create() {
  local folder code node_flags=(--node-id="$NAME")
  use_workdir_of ${ARGS[@]+"${ARGS[@]}"}
  need ACCELERATOR_TYPE RUNTIME_VERSION BUCKET WORKDIR
  ((${#ARGS[@]})) ||
    bad_input "nothing to run; expected create -- --config=FILE [...]"
  [[ $WORKDIR == "$MOUNT"/* ]] || bad_input "WORKDIR: got $WORKDIR," \
    "expected a folder under MOUNT=$MOUNT; others are lost with the VM"
  capacity_flags
  if ((SLICES > 1)); then
    node_flags=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # Expands $folder now.
  trap "rm -rf '$folder'" EXIT
  archive "$folder/code.tar.gz" "$commit"
  code=gs://$BUCKET/code/$NAME-$COMMIT.tar.gz
  run gcloud storage cp "$folder/code.tar.gz" "$code"
  startup_script "$code" >"$folder/startup.sh"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '# %s:\n' "$folder/startup.sh"
    sed '/^# Installs the code/,$d; s/^/#   /' "$folder/startup.sh"
    printf '#   (followed by launch/startup.sh)\n'
  fi
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" "${node_flags[@]}" \
    ${CAPACITY_FLAGS[@]+"${CAPACITY_FLAGS[@]}"} \
    ${CREATE_WORDS[@]+"${CREATE_WORDS[@]}"} \
    --metadata-from-file=startup-script="$folder/startup.sh"
}

case $verb in
  create) cloud && create ;;
  status)
    cloud
    run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
      --format="$format"
    ;;
  rerun) cloud && ssh_all "sudo google_metadata_script_runner startup" ;;
  delete)
    cloud
    confirm "delete the queued resource $NAME in $ZONE with its VMs"
    run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" \
      --force --quiet
    ;;
  *)
    # shellcheck disable=SC2086  # One word each.
    unknown "$verb" $verbs
    ;;
esac
