#!/bin/bash
# Train on several machines under Slurm: one torchrun a machine, one process a GPU.
#
#   sbatch --nodes=2 examples/slurm.sh --train_json_file train.json --meta_json_file meta.json --weights_path weights
#
# Data, backbone and --weights_path must be on storage that every machine sees. --batch_size and --meta_batch_size count
# over all GPUs together. The job may be submitted again as it is: --resume continues from the last checkpoint.
#SBATCH --job-name=dreamprm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SIGTERM two minutes before the time is up: torchrun forwards it, and the run saves and ends.
#SBATCH --signal=TERM@120
#SBATCH --requeue

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
main_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# exec: signals go to srun, and not to this shell.
exec srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" \
  --nproc_per_node=gpu \
  --rdzv_id="$SLURM_JOB_ID" \
  --rdzv_backend=c10d \
  --rdzv_endpoint="$main_machine:29500" \
  --shutdown_timeout=110 \
  reweighting/main.py --resume "$@"
