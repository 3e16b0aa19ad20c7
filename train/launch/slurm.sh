#!/bin/bash
# Several GPU nodes under SLURM: sbatch train/launch/slurm.sh h100-60m --run-dir /shared/runs/first --mesh.fsdp 8
#
# One task for each GPU: under SLURM, JAX gives a process the one GPU whose number is the process's place on its node.
# So every task must see all GPUs of its node (no --gpus-per-task, no --gpu-bind), or JAX looks for one that is hidden.
# JAX finds address, number and place of the processes by itself; run_dir and the data lie on a shared file system.
#SBATCH --job-name=nsa-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8    # as many as GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180      # to every task, three minutes before the end: all save the same step and stop
#SBATCH --requeue              # after a preemption the same command goes on from the last checkpoint
#SBATCH --open-mode=append
set -euo pipefail

# Change: where the repository and its virtual environment are.
cd "${NSA_JAX:-$SLURM_SUBMIT_DIR}"

# A task that fails takes the others with it at once instead of after JAX's time limits.
srun --kill-on-bad-exit=1 .venv/bin/python -m train "$@"
