set -uo pipefail

start=${SLURM_RESTART_COUNT:-0}
say() { echo "[klrl $(date '+%F %T') job $SLURM_JOB_ID start $start] $*"; }
{{setup}}
{{exports}}
