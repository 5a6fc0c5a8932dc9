#!/usr/bin/env bash
# Keeps a run going on a queued resource until it has finished: creates the
# resource, creates it again after the service has taken it away, and starts the
# run again where it shows no sign of life. Runs on your own machine, under tmux
# for instance; it may be stopped and started again at any time.
#
#   launch/babysit.sh [OPTIONS] -- --config=configs/cifar10.py [...]
#
#   --yes                  without it you are asked, once: it deletes resources
#                          that the service has suspended or that have failed
#   --max-recreations=N    100
#   --max-reruns=N         5 in a row
#   --poll-secs=S          60
#   --silent-secs=S        900 without a heartbeat and the run counts as dead
#   --setup-secs=S         1800 from ACTIVE to the first heartbeat
#   --delete-when-done     frees the resource, and its costs, at the end
#   --commit=COMMIT        the code, also after re-creations (HEAD of now)
#   --dry-run              prints the commands that it may use; runs none
#
# It never deletes an ACTIVE resource, but at the end with --delete-when-done,
# and touches nothing that a user has stopped or deleted. It sees that the run
# is done by WORKDIR/DONE, that it is alive by the changes of WORKDIR/lock.json
# and that it gave up by WORKDIR/STOPPED; in the bucket, or without BUCKET on a
# file system that is mounted here too.
#
# Ends with 0 when the run is done, 65 when the run said that its input is bad,
# 1 when it gives up; it always says why. Settings: as queued_resource.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
load_env
cloud
need WORKDIR ACCELERATOR_TYPE RUNTIME_VERSION

marks=$WORKDIR
if [[ -n ${BUCKET:-} ]]; then
  [[ $WORKDIR == "$MOUNT"/* ]] ||
    bad_input "WORKDIR=$WORKDIR is not under MOUNT=$MOUNT"
  marks=gs://$BUCKET/${WORKDIR#"$MOUNT"/}
fi
if [[ -z ${DRY_RUN:-} ]]; then
  confirm "delete and create $NAME again whenever the service takes it away"
fi
commit=$(git -C "$ROOT" rev-parse --short=12 HEAD) ||
  die "no git commit found in $ROOT; VMs get what is committed"
exec python3 "$ROOT/launch/babysit.py" --marks="$marks" --commit="$commit" \
  ${DRY_RUN:+--dry-run} ${WORDS[@]+"${WORDS[@]}"} \
  -- ${ARGS[@]+"${ARGS[@]}"}
