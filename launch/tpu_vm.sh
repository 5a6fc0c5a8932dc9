#!/usr/bin/env bash
# Runs on a TPU VM or pod slice that is created directly: controls all its hosts
# from your own machine.
#
#   launch/tpu_vm.sh create            creates the VM (CAPACITY=spot for Spot)
#   launch/tpu_vm.sh sync              installs the committed code and packages
#                                      on all workers and mounts the bucket;
#                                      stops a run, which saves a checkpoint
#   launch/tpu_vm.sh run -- --config=configs/cifar10.py [...]
#                                      starts the run on all workers, as a
#                                      service independent of the ssh connection
#   launch/tpu_vm.sh logs              of worker 0; [--worker=N|all] [--follow]
#   launch/tpu_vm.sh status            of the VM, and of the run on all workers
#   launch/tpu_vm.sh stop              stops the run, which saves a checkpoint
#   launch/tpu_vm.sh delete [--yes]    deletes the VM; keeps the bucket
#
#   --dry-run          prints the commands, executes none
#   --commit=COMMIT    sync: this commit; by default HEAD, which fails if there
#                      are changes that are not committed
#
# Settings (environment or launch/env; see env.example): PROJECT, ZONE, NAME;
# create: ACCELERATOR_TYPE, RUNTIME_VERSION, CAPACITY, CREATE_FLAGS; sync:
# BUCKET, MOUNT, GCSFUSE_DEB; run: WORKDIR and the other settings of the run.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
load_env
verbs="create sync run logs status stop delete"

verb="" worker=0 follow="" commit=""
for word in ${WORDS[@]+"${WORDS[@]}"}; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --follow) follow=1 ;;
    --commit=*) commit=${word#*=} ;;
    *)
      [[ -z $verb ]] || unknown "$word" "one verb of $verbs"
      verb=$word
      ;;
  esac
done

create() {
  need ACCELERATOR_TYPE RUNTIME_VERSION
  ((SLICES == 1)) || bad_input "SLICES: got $SLICES, expected 1 for a TPU VM;" \
    "use queued_resource.sh for several"
  capacity_flags
  [[ ${CAPACITY:-} != guaranteed ]] ||
    bad_input "CAPACITY: got guaranteed; use queued_resource.sh for it"
  run gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" \
    ${CAPACITY_FLAGS[@]+"${CAPACITY_FLAGS[@]}"} \
    ${CREATE_WORDS[@]+"${CREATE_WORDS[@]}"}
}

sync() {
  local folder node setting words=(CODE=bcm_jax.tar.gz)
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # Expands $folder now.
  trap "rm -rf '$folder'" EXIT
  archive "$folder/bcm_jax.tar.gz" "$commit"
  while IFS= read -r node; do
    run gcloud compute tpus tpu-vm scp "$folder/bcm_jax.tar.gz" \
      "$ROOT/launch/startup.sh" "$node:" "${WHERE[@]}" --worker=all </dev/null
  done < <(nodes)
  for setting in BUCKET MOUNT GCSFUSE_DEB EXTRA; do
    [[ -z ${!setting:-} ]] || words+=("$setting=${!setting}")
  done
  ssh_all "sudo env $(quoted "${words[@]}") bash startup.sh"
  [[ -n ${DRY_RUN:-} ]] || say "commit $COMMIT is on all workers of $NAME"
}

start() {
  use_workdir_of ${ARGS[@]+"${ARGS[@]}"}
  need WORKDIR
  ((${#ARGS[@]})) ||
    bad_input "nothing to run; expected run -- --config=FILE [...]"
  run_environment
  ssh_all "sudo env $(quoted "${ENVIRONMENT[@]}" "$REMOTE/launch/job.sh" \
    start "${ARGS[@]}")"
}

case $verb in
  create) cloud && create ;;
  sync) cloud && sync ;;
  run) cloud && start ;;
  logs)
    cloud
    ssh_all "sudo $REMOTE/launch/job.sh logs${follow:+ follow}" "$worker"
    ;;
  status)
    cloud
    while IFS= read -r node; do
      run gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" \
        --format='value(state,health)' </dev/null
    done < <(nodes)
    ssh_all "sudo $REMOTE/launch/job.sh status || true"
    ;;
  stop) cloud && ssh_all "sudo $REMOTE/launch/job.sh stop" ;;
  delete)
    cloud
    confirm "delete the TPU VM $NAME in $ZONE"
    run gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
    ;;
  *)
    # shellcheck disable=SC2086  # One word each.
    unknown "$verb" $verbs
    ;;
esac
