# Runs on this machine, under NeMo-Run's LocalExecutor. Written by megatron_klrl.launch.nemo_run.
set -uo pipefail
cd {{work_dir}} || exit 1
exec {{python}} -m megatron_klrl.cli {{arguments}}
