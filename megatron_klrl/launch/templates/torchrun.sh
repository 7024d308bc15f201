head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs may share a node, so each has a port of its own, below those that the system hands out.
port=$((12000 + SLURM_JOB_ID % 20000))
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), rendezvous at $head:$port"

# A new store for every restart of torchrun: in the one that its agents share, new ranks find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# In the background: a shell hears no signal while it waits for a command in the foreground.
# A signal to the step reaches every process in it. torchrun would end on USR1, and on TERM give the ranks 30 seconds:
# it ignores both (as do the ranks until they can save, and listen), and ends when the ranks have ended.
(
    trap "" USR1
    exec srun {{srun}} \
        bash -c 'trap "" USR1 TERM; exec "$@"' klrl \
        {{python}} -P -m torch.distributed.run \
        --nnodes={{nodes}} --nproc-per-node={{ranks}} --max-restarts={{restarts}} --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-$start" \
        --no-python {{python}} -P -m megatron_klrl.cli \
        {{arguments}}
) &
step=$!
