#!/usr/bin/env bash
# TPU capacity by a queued resource: the usual way to Spot. The run is in the
# startup script of the VMs, so it comes back with them.
#
#   launch/queued_resource.sh create -- --config=configs/cifar10.py [...]
#   launch/queued_resource.sh status           state and its initiator
#   launch/queued_resource.sh rerun            the startup script again, on all
#                                              workers of an ACTIVE resource
#   launch/queued_resource.sh delete [--yes]   with its VMs; the bucket stays
#
#   --dry-run          prints the commands, and the startup script
#   --commit=COMMIT    create: this commit; left out, HEAD, and it refuses where
#                      there are changes that are not committed
#   --json             status: all that gcloud says
#
# create puts the committed code into gs://BUCKET/code. A suspended resource is
# never given back: delete it and create it again, or let babysit.sh do so.
# Logs: launch/tpu_vm.sh logs.
#
# Settings (environment or launch/env; see env.example): PROJECT, ZONE, NAME;
# create: ACCELERATOR_TYPE, RUNTIME_VERSION, CAPACITY, SLICES, CREATE_FLAGS,
# BUCKET, MOUNT, GCSFUSE_DEB, WORKDIR and what else the run needs.
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

# startup_script CODE: prints startup.sh with the settings and ARGS in front.
startup_script() {
  local setting
  printf '#!/usr/bin/env bash\n'
  quoted export "CODE=$1"
  for setting in BUCKET MOUNT GCSFUSE_DEB EXTRA; do
    [[ -z ${!setting:-} ]] || quoted export "$setting=${!setting}"
  done
  while IFS= read -r setting; do
    quoted export "$setting"
  done < <(run_environment)
  quoted set -- "${ARGS[@]}"
  sed 1d "$ROOT/launch/startup.sh"
}

create() {
  local folder code node_flags=(--node-id="$NAME")
  need ACCELERATOR_TYPE RUNTIME_VERSION BUCKET WORKDIR
  ((${#ARGS[@]})) ||
    bad_input "nothing to run; expected create -- --config=FILE [...]"
  [[ $WORKDIR == "$MOUNT"/* ]] || bad_input "WORKDIR=$WORKDIR is not under" \
    "MOUNT=$MOUNT: it would be lost with the VM"
  capacity_flags
  if ((SLICES > 1)); then
    node_flags=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # The folder of now.
  trap "rm -rf '$folder'" EXIT
  archive "$folder/code.tar.gz" "$commit"
  code=gs://$BUCKET/code/$NAME-$COMMIT.tar.gz
  run gcloud storage cp "$folder/code.tar.gz" "$code"
  startup_script "$code" >"$folder/startup.sh"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '# %s:\n' "$folder/startup.sh"
    sed '/^# Brings the code/,$d; s/^/#   /' "$folder/startup.sh"
    printf '#   (and then launch/startup.sh)\n'
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
