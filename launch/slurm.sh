#!/usr/bin/env bash
#SBATCH --job-name=bcm_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM job, submitted from the root of the repository:
#
#   sbatch launch/slurm.sh --config=configs/cifar10.py --workdir=DIR [...]
#   sbatch --nodes=4 --partition=PARTITION launch/slurm.sh ARGS...
#   launch/slurm.sh --dry-run ARGS...    prints the commands of the job
#
# One task per GPU, as JAX expects under SLURM; every task sees all GPUs of its
# node. For nodes without exactly 8 GPUs pass both --ntasks-per-node and
# --gpus-per-node. DIR is on a file system that all nodes share.
#
# 120 s before the time limit, and on preemption, the tasks get SIGTERM, save a
# checkpoint and end with 75; the job is then requeued. 65 ends the job. After a
# crash it restarts in the same allocation, MAX_RESTARTS (5) times.
set -euo pipefail

# SLURM runs a copy of this file in another folder.
launch=${SLURM_JOB_ID:+${SLURM_SUBMIT_DIR:-$PWD}/launch}
launch=${launch:-$(dirname "${BASH_SOURCE[0]}")}
if [[ ! -f $launch/common.sh ]]; then
  echo "error: $launch/common.sh does not exist; submit from the root of the" \
    "repository: sbatch launch/slurm.sh ARGS..." >&2
  exit 65
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$launch/common.sh"

case ${1:-} in
  --help) usage && exit ;;
  --dry-run) DRY_RUN=1 && shift ;;
esac
load_env
[[ -n ${SLURM_JOB_ID:-}${DRY_RUN:-} ]] || bad_input "this is not a SLURM job;" \
  "submit it: sbatch launch/slurm.sh ARGS... (or try --dry-run ARGS...)"

# The first task that ends with 75 must not kill the others, which may still be
# saving (--kill-on-bad-exit=0); a task that hangs must not block the job.
command=("$ROOT/launch/supervise.sh" --pass-preempted
  srun --kill-on-bad-exit=0 --wait=120 "$ROOT/launch/run.sh" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  quoted "${command[@]}"
  quoted scontrol requeue "${SLURM_JOB_ID:-JOB_ID}"
  exit
fi

status=0
"${command[@]}" || status=$?
if ((status == EXIT_PREEMPTED)); then
  say "preempted and saved: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
