#!/bin/sh
# Debian's SLURM for the tests here, where it is missing and may be installed (root, apt-get). Says what it does, and
# always ends well: tests that find no SLURM are skipped with the reason.
set -u

packages="slurmctld slurmd slurm-client munge iproute2 util-linux procps"
say() { echo "[test-cluster] $*"; }

missing=
for program in slurmctld slurmd sbatch munged mungekey ip unshare nsenter pkill; do
    command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    say "SKIPPED: no$missing here, and installing needs root: apt-get install $packages"
elif ! command -v apt-get >/dev/null 2>&1; then
    say "SKIPPED: no$missing here, and no apt-get to install them"
else
    say "apt-get install $packages"
    # Daemons of a package are not started: the tests start their own.
    log=$(mktemp)
    # shellcheck disable=SC2086  # several words
    if apt-get update -qq >"$log" 2>&1 \
        && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq -y --no-install-recommends $packages >>"$log" 2>&1; then
        say "installed"
    else
        say "SKIPPED: SLURM cannot be installed: $(tail -n 1 "$log")"
    fi
    rm -f "$log"
fi
exit 0
