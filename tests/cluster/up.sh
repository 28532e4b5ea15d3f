#!/usr/bin/env bash
# A Slurm cluster on this one host: a controller and two nodes of one CPU each, without systemd, cgroups or a database. For root, in a
# container or on a CI machine:
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
#   tests/cluster/up.sh [FOLDER]           default: /tmp/archrepair-cluster; everything it writes is in there
#   sinfo, sbatch, scontrol …              speak to it: /etc/slurm/slurm.conf is a link to its configuration
#   tests/cluster/down.sh [FOLDER]
set -euo pipefail
folder=$(realpath -m "${1:-/tmp/archrepair-cluster}")
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" > /dev/null || { echo "up.sh: $program is not installed: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "up.sh: slurmd needs root" >&2; exit 1; }
[ ! -e "$folder/slurm.conf" ] || { echo "up.sh: $folder is in use; tests/cluster/down.sh $folder ends it" >&2; exit 1; }
[ ! -e /etc/slurm/slurm.conf ] || { echo "up.sh: there is a cluster already: /etc/slurm/slurm.conf" >&2; exit 1; }
mkdir -p "$folder"/{state,spool-node1,spool-node2,log}
chmod 755 "$folder"
export SLURM_CONF="$folder/slurm.conf"
host=$(hostname -s)

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
# --force: munged would rather not run as root, nor below /tmp
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" 2> /dev/null

cat > "$SLURM_CONF" <<END
ClusterName=archrepair
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5
MinJobAge=300
MaxJobCount=200
KillWait=10
GresTypes=gpu
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=64000 Gres=gpu:1
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END
echo "NodeName=node[1-2] Name=gpu File=/dev/null" > "$folder/gres.conf"  # counted, not there: jobs may ask for one, as the profile does

# A link and not the variable SLURM_CONF: Snakemake's plugin takes all variables of Slurm's out of the environment of its jobs.
mkdir -p /etc/slurm
ln -sf "$SLURM_CONF" /etc/slurm/slurm.conf
slurmctld -f "$SLURM_CONF"
for node in node1 node2; do
    slurmd -f "$SLURM_CONF" -N "$node"
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null || true)" != 2 ] || break
    sleep 0.5
done
sinfo
[ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] || { echo "up.sh: the nodes do not come up; see $folder/log" >&2; exit 1; }
