#!/usr/bin/env bash
# End the cluster that up.sh has started, with its jobs, and remove its folder.
set -uo pipefail
folder=$(realpath -m "${1:-/tmp/archrepair-cluster}")
[ -e "$folder/slurm.conf" ] || { echo "down.sh: there is no cluster in $folder" >&2; exit 1; }
export SLURM_CONF="$folder/slurm.conf"
timeout 10 scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 20); do
    [ -n "$(timeout 5 squeue --noheader 2> /dev/null)" ] || break
    sleep 0.5
done
pids=$(cat "$folder"/*.pid 2> /dev/null)
[ -z "$pids" ] || kill $pids 2> /dev/null
for pid in $pids; do
    for _ in $(seq 40); do kill -0 "$pid" 2> /dev/null || break; sleep 0.25; done
done
[ "$(readlink /etc/slurm/slurm.conf)" != "$SLURM_CONF" ] || rm /etc/slurm/slurm.conf
rm -rf "$folder"
