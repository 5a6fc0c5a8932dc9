#!/usr/bin/env bash
# Runs on GKE as a JobSet: slices are jobs, hosts are pods.
#
#   launch/gke.sh render -- --config=configs/cifar10.py [...]   prints the YAML
#   launch/gke.sh apply -- --config=...     submits it with kubectl
#   launch/gke.sh xpk -- --config=...       submits the run with xpk instead
#   launch/gke.sh status
#   launch/gke.sh logs [--follow]           logs of host 0 of slice 0
#   launch/gke.sh delete [--yes]            the JobSet; keeps the bucket
#
#   --dry-run    prints the commands (apply: and the YAML), executes none
#
# Settings (environment or launch/env; see env.example): NAME, ACCELERATOR_TYPE
# (as in accelerators.py), IMAGE (docker/Dockerfile), WORKDIR and the other
# settings of the run; SLICES, NAMESPACE, BUCKET, MOUNT, SERVICE_ACCOUNT, QUEUE
# (of Kueue), CAPACITY=spot, MAX_RESTARTS, GRACE_SECS. xpk: also PROJECT, ZONE,
# CLUSTER and XPK_STORAGE.
#
# The JobSet ends on exit code 65, restarts without limit on 75 and when its
# nodes are preempted, and MAX_RESTARTS times after crashes; it needs JobSet
# 0.10. With xpk all restarts count, also those after lost nodes.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
load_env
NAMESPACE=${NAMESPACE:-default}
verbs="render apply xpk status logs delete"

verb="" follow=""
for word in ${WORDS[@]+"${WORDS[@]}"}; do
  case $word in
    --follow) follow=1 ;;
    *)
      [[ -z $verb ]] || unknown "$word" "one verb of $verbs"
      verb=$word
      ;;
  esac
done

job_settings() {
  use_workdir_of ${ARGS[@]+"${ARGS[@]}"}
  need NAME ACCELERATOR_TYPE IMAGE WORKDIR
  ((${#ARGS[@]})) ||
    bad_input "nothing to run; expected $verb -- --config=FILE [...]"
}

# render: prints the JobSet.
render() {
  local spot=()
  if [[ ${CAPACITY:-} == spot ]]; then spot=(--spot); fi
  run_environment
  python3 "$ROOT/launch/render_jobset.py" --name="$NAME" \
    --accelerator="$ACCELERATOR_TYPE" --slices="$SLICES" --image="$IMAGE" \
    --namespace="$NAMESPACE" --workdir="$WORKDIR" --mount="$MOUNT" \
    --bucket="${BUCKET:-}" --service-account="${SERVICE_ACCOUNT:-}" \
    --queue="${QUEUE:-}" --max-restarts="$MAX_RESTARTS" \
    --grace="$GRACE_SECS" ${spot[@]+"${spot[@]}"} \
    "${ENVIRONMENT[@]/#/--env=}" -- "${ARGS[@]}"
}

apply() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # Expands $folder now.
  trap "rm -rf '$folder'" EXIT
  render >"$folder/jobset.yaml"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '# %s:\n' "$folder/jobset.yaml"
    sed 's/^/#   /' "$folder/jobset.yaml"
  fi
  # strict: an old JobSet would drop unknown rules, and then treat a preemption
  # as bad input.
  run kubectl apply --validate=strict --filename="$folder/jobset.yaml"
}

xpk_create() {
  local setting words=()
  need PROJECT ZONE CLUSTER
  run_environment
  for setting in "${ENVIRONMENT[@]}"; do
    words+=(--env "$setting")
  done
  [[ -z ${XPK_STORAGE:-} ]] || words+=(--storage="$XPK_STORAGE")
  # xpk ends a workload on all other exit codes, here only 65.
  run xpk workload create --project="$PROJECT" --zone="$ZONE" \
    --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$ACCELERATOR_TYPE" \
    --num-slices="$SLICES" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1-64,66-126 \
    --termination-grace-period-seconds="$GRACE_SECS" \
    "${words[@]}" --command="exec $(quoted launch/run.sh "${ARGS[@]}")"
}

case $verb in
  render) job_settings && render ;;
  apply) job_settings && apply ;;
  xpk) job_settings && xpk_create ;;
  status)
    need NAME
    run kubectl get jobset "$NAME" --namespace="$NAMESPACE"
    run kubectl get pods --namespace="$NAMESPACE" --output=wide \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  logs)
    need NAME
    run kubectl logs --namespace="$NAMESPACE" --container=main --tail=100 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" \
      ${follow:+--follow}
    ;;
  delete)
    need NAME
    confirm "delete the JobSet $NAME in $NAMESPACE"
    run kubectl delete jobset "$NAME" --namespace="$NAMESPACE"
    ;;
  *)
    # shellcheck disable=SC2086  # One word each.
    unknown "$verb" $verbs
    ;;
esac
