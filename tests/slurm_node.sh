#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests of slurm/. It needs Debian or Ubuntu, and root.
#
#     bash tests/slurm_node.sh install         # slurm-wlm and munge, with apt, if they are not there
#     bash tests/slurm_node.sh start FOLDER    # boots it; its files, logs too, lie in FOLDER
#     export SLURM_CONF=FOLDER/slurm.conf      # now sbatch and squeue mean this Slurm
#     .venv/bin/pytest tests/test_slurm_real.py
#     bash tests/slurm_node.sh stop FOLDER     # ends its jobs and its daemons; FOLDER stays
#
# What it starts: munged (unless one runs already), slurmctld and slurmd, on ports 16817 and 16818,
# without systemd and without accounting. It has 8 slots whatever the machine has, since jobs of the
# tests are small, and calls itself one-node-test, which is how the tests know that they may submit
# to it: to another Slurm they send nothing, and are skipped. Only /run/munge and what apt installs
# lie outside FOLDER.
set -euo pipefail

fail() { echo "error: slurm_node.sh: $1" >&2; exit 2; }

explain() { sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p;}' "$0"; }

install_packages() {
    [ "$(id -u)" = 0 ] || fail "root is needed to install Slurm"
    command -v apt-get > /dev/null || fail "no apt-get here: Debian or Ubuntu is needed"
    if command -v slurmctld slurmd munged > /dev/null; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

write_configuration() {
    local host; host=$(hostname -s)
    cat > "$1/slurm.conf" <<EOF
ClusterName=one-node-test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# requeued jobs wait for so long plus 1 s; the default is 120, below 5 it is silently 120
AuthInfo=cred_expire=5
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the machine may have fewer cores than the configuration says
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
# so that submitit's logs of two boots do not meet
FirstJobId=$((1000 + $(date +%s) % 1000000))
KillWait=5
MinJobAge=300
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 \
 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
}

start() {
    [ "$(id -u)" = 0 ] || fail "root is needed to start the daemons"
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null || fail "no $program here: bash tests/slurm_node.sh install"
    done
    mkdir -p "$1/state" "$1/spool"
    write_configuration "$1"
    export SLURM_CONF=$1/slurm.conf
    install -d -o munge -g munge -m 755 /run/munge
    if ! munge -n > /dev/null 2>&1; then
        runuser -u munge -- "$(command -v munged)"
        cp /run/munge/munged.pid "$1/munged.pid"  # ours to stop
    fi
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --format %T 2> /dev/null)" = idle ]; then
            echo "Slurm answers: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    echo "error: slurm_node.sh: the node did not become idle; see the logs in $1" >&2
    tail -n 20 "$1"/slurm*.log >&2
    exit 1
}

stop() {
    export SLURM_CONF=$1/slurm.conf
    scancel --quiet --user "$(id -un)" || true
    for daemon in slurmd slurmctld munged; do
        if [ -f "$1/$daemon.pid" ]; then kill "$(cat "$1/$daemon.pid")" || true; fi
    done
}

case "${1:-} ${2:-}" in
    "install ") install_packages ;;
    "start "?*) start "$(realpath -m "$2")" ;;
    "stop "?*) stop "$(realpath -m "$2")" ;;
    " " | "help "* | "-h "* | "--help "*) explain ;;
    "start " | "stop ") fail "$1 which? $1 FOLDER" ;;
    *) explain >&2; fail "no such command: $*" ;;
esac
