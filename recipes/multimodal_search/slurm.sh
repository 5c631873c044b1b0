#!/usr/bin/env bash
#SBATCH --job-name=search-agent
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
# Two nodes under Slurm: `sbatch slurm.sh --data data/fvqa_train.parquet --val data/fvqa_test.parquet`, in the recipe's
# folder, which all nodes must see under this path, with an environment in which `verl-tapo doctor` is content.
# Not run on a cluster yet: tests run it with stand-ins for srun and scontrol.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
nodes="${SLURM_JOB_NUM_NODES:?start this with sbatch}"
# Not through `head`: a writer that is not read to its end would be killed, and the job with it.
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${hosts%%$'\n'*}"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I | awk '{print $1}')"
export RAY_PORT="${RAY_PORT:-6379}"

# Ray ends with its step, and each step with the job.
srun --nodes=1 --ntasks=1 --nodelist="$first" --overlap ./ray_cluster.sh head --block &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
export RAY_ADDRESS="$address:$RAY_PORT"
on_first() { srun --nodes=1 --ntasks=1 --nodelist="$first" --overlap "$@"; }
on_first ./ray_cluster.sh wait 1
if [ "$nodes" -gt 1 ]; then
  srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$first" --overlap ./ray_cluster.sh join "$address" --block &
fi
on_first ./ray_cluster.sh wait "$nodes"
on_first ./train.sh --nodes "$nodes" "$@"
