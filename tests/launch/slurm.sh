#!/usr/bin/env bash
# A Slurm of two small machines on this one, all on loopback and without systemd:
#
#     tests/launch/slurm.sh start FOLDER     # then: export SLURM_CONF=FOLDER/slurm.conf
#     tests/launch/slurm.sh stop FOLDER
#
# Needs Debian's slurmctld, slurmd, slurm-client and munge. Nothing outside FOLDER is changed; the
# two machines are two slurmd with one CPU and one GPU each, as far as Slurm counts. They have
# addresses as names, which processes on them reach each other by.
set -euo pipefail

action="${1:?start or stop}"
folder="$(realpath -m "${2:?a folder}")"
export SLURM_CONF="$folder/slurm.conf"
export PATH="$PATH:/usr/sbin:/sbin"

start() {
    mkdir -p "$folder"/{munge,state,spool-127.0.0.1,spool-127.0.0.2}
    chmod 711 "$folder" "$folder/munge"
    local user me memory
    user="$(id -un)"
    me="$(hostname)"
    memory="$(awk '/MemTotal/ {print int($2 / 1024 / 3)}' /proc/meminfo)"
    local port=$((20000 + $$ % 20000))
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/munge.key")
    munged --key-file="$folder/munge/munge.key" --socket="$folder/munge/munge.socket" \
        --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" \
        --seed-file="$folder/munge/munged.seed"
    cat >"$SLURM_CONF" <<CONF
ClusterName=tumorjax
SlurmctldHost=$me(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# Requeued jobs wait for as long as the credentials of their first start are good.
AuthInfo=socket=$folder/munge/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=127.0.0.1 NodeHostname=$me NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=1 RealMemory=$memory Gres=gpu:1
NodeName=127.0.0.2 NodeHostname=$me NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=1 RealMemory=$memory Gres=gpu:1
PartitionName=small Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
    # A file that is there stands for the GPU.
    echo "NodeName=127.0.0.[1-2] Name=gpu File=/dev/null" >"$folder/gres.conf"
    slurmctld
    slurmd -N 127.0.0.1
    slurmd -N 127.0.0.2
    for _ in $(seq 60); do
        if [[ "$(sinfo --noheader --format=%t 2>/dev/null)" == idle ]]; then
            return
        fi
        sleep 0.5
    done
    tail -n 20 "$folder"/slurm*.log >&2
    stop
    echo "tests/launch/slurm.sh: the machines are not idle after 30 s, see above" >&2
    exit 1
}

stop() {
    local file pid
    scancel --user="$(id -un)" --signal=KILL 2>/dev/null || true
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/munged.pid"; do
        [[ -s "$file" ]] || continue
        pid="$(<"$file")"
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 60); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.25
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

"$action"
