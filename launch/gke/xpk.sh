#!/usr/bin/env bash
# What study_tpu.yaml and study_gpu.yaml do, by xpk, on a cluster that "xpk cluster create" made:
#
#     PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster IMAGE=... BUCKET=my-bucket \
#         launch/gke/xpk.sh tpu
#
# Further arguments go to xpk, for instance --dry-run. SLICES and NODES change the size. The workdir is
# a bucket that xpk mounts in all jobs, once it was told to:
#
#     xpk storage attach runs --project=my-project --zone=us-west4-a --cluster=my-cluster \
#         --type=gcsfuse --bucket=my-bucket --size=1000 --mount-point=/runs --readonly=false --auto-mount=true \
#         --mount-options=implicit-dirs,rename-dir-limit=200000
#
# xpk runs containers as the image's user, to whom the chips must belong: build the image with
# --build-arg USER_NAME=root.
set -euo pipefail

kind="${1:?tpu or gpu}"
shift
case "$kind" in
tpu) machines=(--tpu-type=v5litepod-256 "--num-slices=${SLICES:-1}") ;;
gpu)
    nodes="${NODES:-8}"
    # xpk itself tells where the coordinator is.
    machines=(--device-type=h100-80gb-8 "--num-nodes=$nodes" "--env=JAX_NUM_PROCESSES=$nodes")
    ;;
*)
    echo "launch/gke/xpk.sh: $kind is neither tpu nor gpu" >&2
    exit 2
    ;;
esac
job="--config=configs/scaling.py:paper --workdir=/runs/paper"
job+=" --config.data.store=gs://${BUCKET:?a bucket}/store --config.processes.coordinator=auto"
job+=" --config.processes.start_seconds=1200 --config.processes.grace_seconds=25"
# 160 cells, side by side as far as there are chips; of TPU v5e a pair trains one.
job+=" '--config.grid.seeds=(0,1,2,3,4,5,6,7,8,9)'"
[[ "$kind" == gpu ]] || job+=" --config.mesh.data=2"
xpk workload create \
    --project="${PROJECT:?a project}" --zone="${ZONE:?a zone}" --cluster="${CLUSTER:?a cluster}" \
    --workload="${WORKLOAD:-tumorjax-study}" --docker-image="${IMAGE:?an image}" \
    "${machines[@]}" \
    --max-restarts=20 --restart-on-exit-codes=75,69 --termination-grace-period-seconds=120 \
    --command="exec tini -s -g -- launch/run.sh $job" "$@"
