#!/usr/bin/env bash
# A SLURM cluster on this machine, for tests. Needs root, iproute2, util-linux, munge, slurmctld, slurmd, slurm-client.
#   cluster.sh up DIR NODES        starts it; DIR holds all of its state
#   cluster.sh exec DIR CMD...     runs a command on the head, in the current directory
#   cluster.sh on DIR NODE CMD...  runs a command on a node
#   cluster.sh crash DIR NODE      cuts a node's power;  cluster.sh boot DIR NODE  switches it on
#   cluster.sh down DIR
#
# The head and every node are process trees in network, host name, mount and process namespaces of their own; the file
# system is shared. Nothing shows up in the machine's own network, and the end of one process, whose id stands in
# DIR/run/outer.pid, is the end of everything: daemons, jobs, and what the jobs left behind.
set -euo pipefail

self=$(realpath "$0")
verb=$1
dir=$(realpath -m "$2")
shift 2
export SLURM_CONF=$dir/slurm.conf
net=10.88.0
isolated=(unshare --net --uts --mount --pid --fork --kill-child=KILL --mount-proc)

enter() { # PID CMD...: run in the namespaces of a process
    local pid=$1
    shift
    nsenter --target "$pid" --net --uts --mount --pid --wd="$PWD" -- "$@"
}
child_of() { tr -d ' ' <"/proc/$1/task/$1/children"; }
on_head() { enter "$(cat "$dir/run/head.pid")" "$@"; }
retry() { # TIMES CMD...
    local times=$1
    shift
    for _ in $(seq "$times"); do
        if "$@"; then return 0; fi
        sleep 0.1
    done
    return 1
}

configure() { # NODES
    local nodes=$1
    { echo "127.0.0.1 localhost"; echo "$net.254 head"; for i in $(seq "$nodes"); do echo "$net.$i node$i"; done; } >"$dir/hosts"
    mungekey --create --keyfile="$dir/munge.key"
    chmod 600 "$dir/munge.key"
    echo "CgroupAutomount=no" >"$dir/cgroup.conf"
    # cred_expire: a requeued job waits that long, 120 seconds by default, and 5 is the least. MinJobAge: ended jobs stay
    # visible. The preempt_send_user_signal of SlurmctldParameters lets --signal=B:USR1 apply to preemption too.
    cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=5
SlurmdTimeout=8
TCPTimeout=2
MessageTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-$nodes] CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=20 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
}

up() { # NODES
    local nodes=$1
    mkdir -p "$dir"/{run,log,state,spool}
    chmod 755 "$dir" "$dir/run"
    configure "$nodes"
    setsid "${isolated[@]}" "$self" run-head "$dir" "$nodes" </dev/null >"$dir/log/head.out" 2>&1 &
    echo $! >"$dir/run/outer.pid"
    retry 200 test -s "$dir/run/ready" || fail
    child_of "$(cat "$dir/run/outer.pid")" >"$dir/run/head.pid"
    retry 200 all_idle "$nodes" || fail
}
all_idle() { [ "$(on_head sinfo --noheader --partition=batch --states=idle --format=%D 2>/dev/null)" = "$1" ]; }
fail() {
    echo "the cluster did not come up; its logs:" >&2
    tail -n 5 "$dir"/log/* >&2
    down
    exit 1
}
down() {
    local pid
    pid=$(cat "$dir/run/outer.pid")
    kill -KILL "$pid" 2>/dev/null || true
    retry 50 test ! -e "/proc/$pid"
}

run_head() { # NODES; is process 1 of its namespace
    hostname head
    mount --bind "$dir/hosts" /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$net.254/24" dev br0
    ip link set br0 up
    munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed" --num-threads=2
    slurmctld
    for i in $(seq "$1"); do boot "node$i"; done
    echo yes >"$dir/run/ready"
    rest
}
boot() { # NODE; on the head
    local node=$1 number=${1#node} pid
    setsid "${isolated[@]}" "$self" run-node "$dir" "$node" </dev/null >>"$dir/log/$node.out" 2>&1 &
    pid=$!
    echo "$pid" >"$dir/run/$node.pid"
    retry 50 has_own_network "$pid"
    ip link del "to$number" 2>/dev/null || true
    # The same address after a crash: the others remember it for half a minute.
    ip link add "to$number" type veth peer name eth0 address "02:00:00:00:00:0$number" netns "$pid"
    ip link set "to$number" master br0 up
}
has_own_network() { [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }
run_node() { # NODE; is process 1 of its namespace
    hostname "$1"
    ip link set lo up
    retry 100 ip link show eth0 >/dev/null 2>&1
    ip addr add "$net.${1#node}/24" dev eth0
    ip link set eth0 up
    slurmd -N "$1"
    rest
}
rest() { while :; do sleep 3600 & wait $! || true; done; } # as process 1 it also collects orphans

case $verb in
up) up "$1" ;;
down) down ;;
exec) on_head "$@" ;;
on) # the children of a process are named in the numbers of the namespace that asks
    node_pid=$(cat "$dir/run/$1.pid")
    shift
    # shellcheck disable=SC2016
    on_head bash -c 'read -r child <"/proc/$1/task/$1/children"; shift
        exec nsenter --target "${child% }" --net --uts --mount --pid --wd="$PWD" -- "$@"' on "$node_pid" "$@" ;;
crash) on_head kill -KILL "$(cat "$dir/run/$1.pid")" ;;
boot) on_head "$self" boot-here "$dir" "$1" ;;
boot-here) boot "$1" ;;
run-head) run_head "$1" ;;
run-node) run_node "$1" ;;
*)
    echo "unknown: $verb" >&2
    exit 2
    ;;
esac
