#!/usr/bin/env bash
# Process 1 of a node of the lab: its own name, address, ports, /tmp and /dev/shm; ends when it is killed ("power off").
set -eu
node=$1
# On a busy machine SLURM would take a node whose daemon gets no processor for a dead one; its tasks run as usual
# (PropagatePrioProcess).
renice -n -10 -p $$ >/dev/null || true
hostname "node$node"
mount --bind "$LAB_DIR/etc/hosts" /etc/hosts
mount -t tmpfs shm /dev/shm
# What all nodes share but lies under /tmp must stay visible under the private /tmp.
IFS=: read -ra shared <<<"${LAB_SHARED:-}"
hold=$LAB_DIR/run/hold-$node
mkdir -p "$hold"
mount -t tmpfs hold "$hold"
for index in "${!shared[@]}"; do
    mkdir "$hold/$index"
    mount --bind "${shared[$index]}" "$hold/$index"
done
mount -t tmpfs -o mode=1777 tmp /tmp
for index in "${!shared[@]}"; do
    mkdir -p "${shared[$index]}"
    mount --bind "$hold/$index" "${shared[$index]}"
done
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip addr add "10.77.0.$((10 + node))/16" dev eth0
ip link set eth0 up
mkdir -p "$LAB_DIR/spool/node$node"
slurmd -D -N "node$node" -f "$SLURM_CONF" &
while :; do sleep 86400 & wait $! || true; done
