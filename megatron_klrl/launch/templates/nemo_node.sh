# Runs once on each node of a NeMo-Run job. Written by megatron_klrl.launch.nemo_run.
{{environment}}
run_dir={{run_dir}}
unfinished=$run_dir/unfinished.json
# What an earlier start left says nothing of this one.
if [ "$SLURM_PROCID" = 0 ]; then rm -f "$unfinished" "$run_dir/error.json"; fi
resume=
if [ "$start" -gt 0 ] || [ {{restarts}} -gt 0 ]; then resume=--resume; fi
# The node that NeMo-Run's batch script, and its srun, run on is the first.
head=$SLURM_LAUNCH_NODE_IPADDR
port=$((12000 + SLURM_JOB_ID % 20000))

# A new store for every restart of torchrun: in the one that its agents share, new ranks find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A signal to the step reaches every process in it. torchrun would end on USR1, and on TERM give the ranks 30 seconds:
# it ignores both (as do this shell, and the ranks until they can save, and listen), and ends when the ranks have ended.
trap "" USR1 TERM
{{python}} -P -m torch.distributed.run \
    --nnodes={{nodes}} --nproc-per-node={{ranks}} --max-restarts={{restarts}} --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-$start" \
    --no-python {{python}} -P -m megatron_klrl.cli \
    {{arguments}} ${resume:+"$resume"}
code=$?
if [ -e "$unfinished" ]; then
    say "stopped before the end: $(cat "$unfinished")"
    exit 75  # NeMo-Run's batch script requeues what fails, up to the executor's retries
fi
exit "$code"
