#!/bin/bash
# Make labels under Slurm: each job serves the policy with vLLM on the GPUs of a machine, and asks it.
#
#   sbatch --array=1-8 examples/label.sh Qwen/Qwen2.5-VL-7B-Instruct questions.jsonl --output_train train.jsonl
#
# Behind the model stand the flags of `dreamprm label`. Each job of the array asks its part of the questions, and writes
# train.part-1-of-8.jsonl and so on. A job may be submitted again as it is: it resumes from its --store. Some of the parts
# only: PARTS=8 sbatch --array=3,5 …
#SBATCH --job-name=dreamprm-label
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
model=$1
shift
gpus=${SLURM_GPUS_ON_NODE:-1}
port=$((20000 + SLURM_JOB_ID % 20000)) # of its own: jobs may share a machine
parts=${PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}

# One copy of the model a GPU. For a model that one GPU does not hold: --tensor-parallel-size in place of it.
vllm serve "$model" --host 127.0.0.1 --port "$port" --data-parallel-size "$gpus" --generation-config vllm &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
  kill -0 "$server" # ends the job if the server has ended
  sleep 5
done

.venv/bin/python reweighting/label.py "$@" \
  --policy "http://127.0.0.1:$port/v1" \
  --policy_model "$model" \
  --concurrency $((64 * gpus)) \
  --part "${SLURM_ARRAY_TASK_ID:-1}/$parts"
