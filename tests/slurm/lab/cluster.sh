#!/usr/bin/env bash
# A SLURM cluster in namespaces. `cluster.sh init` is process 1 of the lab: the switch, the controller and the nodes;
# killing it ends everything. Inside the lab, `cluster.sh boot N` switches node N on (again).
# LAB_DIR is the lab's directory, which every node sees; LAB_NODES how many nodes there are.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SLURM_CONF=$LAB_DIR/etc/slurm.conf

boot() { # one node: namespaces of its own, and a cable to the switch
    local node=$1 init
    setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$here/node.sh" "$node" \
        >>"$LAB_DIR/log/node$node.out" 2>&1 </dev/null &
    local outer=$!
    until init=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) && init=${init%% *} && [ -n "$init" ]; do sleep 0.01; done
    echo "$init" >"$LAB_DIR/run/init-$node"
    # The cable of a node without power may still be there: the kernel takes namespaces apart when it has time.
    ip link del "cable$node" 2>/dev/null || true
    ip link add "cable$node" type veth peer name eth0 netns "$init"
    ip link set "cable$node" master switch up
}

init() {
    hostname control
    mount --bind "$LAB_DIR/etc/hosts" /etc/hosts
    ip link set lo up
    ip link add switch type bridge
    ip addr add 10.77.0.1/16 dev switch
    ip link set switch up
    renice -n -10 -p $$ >/dev/null || true # see node.sh
    munged --socket="$LAB_DIR/run/munge.sock" --key-file="$LAB_DIR/etc/munge.key" --pid-file="$LAB_DIR/run/munged.pid" \
        --log-file="$LAB_DIR/log/munged.log" --seed-file="$LAB_DIR/run/munge.seed" --num-threads=2
    slurmctld -c -i -f "$SLURM_CONF"
    local node
    for node in $(seq "$LAB_NODES"); do boot "$node" & done
    # Process 1 must stay, and reap what loses its parent.
    while :; do sleep 86400 & wait $! || true; done
}

"$@"
