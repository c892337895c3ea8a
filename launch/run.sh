#!/usr/bin/env bash
# Runs a job as schedulers want it:
#
#     launch/run.sh --config=configs/scaling.py --workdir=runs/study
#
# A job that finished with cases set aside (WORKDIR/rejected.csv) exits with 1, which schedulers
# take for a failure and try again. Here it is 0. All other codes stay as they are: 75 and 69 mean
# that the same command goes on from there, 2 and 3 that it would only fail again.
set -uo pipefail

# Signals go to all processes of a step or, with "tini -g", of a container. The job saves and stops;
# this shell waits until it has.
trap : TERM USR1 USR2
python -m tumorjax.main "$@"
code=$?
if ((code == 1)); then
    echo "launch/run.sh: finished, with cases set aside in rejected.csv" >&2
    exit 0
fi
exit "$code"
