#!/usr/bin/env bash
# Runs a training job on a queued resource until it has finished: creates the
# resource, re-creates it after the service has reclaimed it, and restarts the
# run if it has no heartbeat. Runs on your own machine, for example under tmux;
# it may be stopped and restarted at any time.
#
#   launch/babysit.sh [OPTIONS] -- --config=configs/cifar10.py [...]
#
#   --yes                  does not ask for confirmation to delete resources
#                          that the service has suspended or that have failed
#   --max-recreations=N    limit on re-creations (100)
#   --max-reruns=N         limit on consecutive restarts of the run (5)
#   --poll-secs=S          seconds between checks (60)
#   --silent-secs=S        seconds without a heartbeat after which the run is
#                          considered dead (900)
#   --setup-secs=S         seconds from ACTIVE to the first heartbeat (1800)
#   --delete-when-done     deletes the resource at the end, which ends its costs
#   --commit=COMMIT        commit of the code, also after re-creations (HEAD)
#   --dry-run              prints the commands that it may run, runs none
#
# It never deletes an ACTIVE resource, except at the end with
# --delete-when-done, and never changes a resource that a user has stopped or
# deleted. WORKDIR/DONE marks a finished run, changes in WORKDIR/lock/ are its
# heartbeat, and WORKDIR/STOPPED marks a run that gave up; in the bucket, or
# without BUCKET on a shared file system.
#
# Exit status: 0 when the run has finished, 65 for bad input of the run, 1 when
# it gives up; the reason is printed. Settings: as for queued_resource.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
load_env
cloud
use_workdir_of ${ARGS[@]+"${ARGS[@]}"}
need WORKDIR ACCELERATOR_TYPE RUNTIME_VERSION

marks=$WORKDIR
if [[ -n ${BUCKET:-} ]]; then
  [[ $WORKDIR == "$MOUNT"/* ]] ||
    bad_input "WORKDIR: got $WORKDIR, expected a folder under MOUNT=$MOUNT"
  marks=gs://$BUCKET/${WORKDIR#"$MOUNT"/}
fi
if [[ -z ${DRY_RUN:-} ]]; then
  confirm "delete and re-create $NAME whenever the service reclaims it"
fi
commit=$(git -C "$ROOT" rev-parse --short=12 HEAD) ||
  die "$ROOT: no git commit found; VMs get only committed code"
exec python3 "$ROOT/launch/babysit.py" --marks="$marks" --commit="$commit" \
  ${DRY_RUN:+--dry-run} ${WORDS[@]+"${WORDS[@]}"} \
  -- ${ARGS[@]+"${ARGS[@]}"}
