# shellcheck shell=bash
# What a batch script does when its job ends, see study.sbatch.

# Ends the batch script with a job's exit code. A job that was told to stop (75) is put back into the
# queue; so is one that lost a process or was killed (69, 137), five times.
finish() {
    local code=$1
    if ((code == 75 || ((code == 69 || code == 137) && ${SLURM_RESTART_COUNT:-0} < 5))); then
        echo "exit code $code: back into the queue"
        # Slurm itself may have done so already, when it took the machines away.
        scontrol requeue "$SLURM_JOB_ID" || echo "not possible; submit the same command again" >&2
    fi
    exit "$code"
}
