"""Everything that Megatron-Core 0.19 needs beyond configuration flags, and nothing else.

Two parts. ``run_on_cpu`` lets unmodified Megatron classes run without CUDA; it does nothing where CUDA is available.
The other functions work around upstream bugs that show on any device (``torch_adam_*``: wherever neither Transformer
Engine nor Apex provides Adam); each names the upstream cause and the condition under which it can go.
"""

import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def run_on_cpu() -> bool:
    """Make requests for a CUDA device mean the CPU, for the life of this process.

    Returns:
        True when this process now runs (or already ran) Megatron on CPU; False where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    if not _CudaMeansCpu.entered:
        _replace_cuda_functions()
        _replace_cuda_kernels()
        _CudaMeansCpu().__enter__()
    return True


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites explicit requests for CUDA. A public torch mechanism: no class of Megatron changes.

    CPU backward runs in the calling thread, so autograd hooks (DDP, recompute) see the mode too.
    """

    entered = False

    def __enter__(self) -> "_CudaMeansCpu":
        _CudaMeansCpu.entered = True
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU  # optimizer.py, clip_grads.py, schedules.py create scalars on "cuda"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # rope_utils.py pins under context parallelism; pinning needs a driver
        if func is torch.Tensor.cuda:
            return args[0]  # language_module.py moves the tied embedding, distrib_optimizer.py its shards
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer.py, distrib_optimizer.py and clip_grads.py compare type() with "torch.cuda.FloatTensor"
            return result.replace("torch.", "torch.cuda.", 1) if not result.startswith("torch.cuda.") else result
        return result


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _DoneStream:
    """The only stream of a CPU: what was put on it is always done."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event

    def query(self) -> bool:
        return True


def _replace_cuda_functions() -> None:
    """Give the ``torch.cuda`` functions that Megatron calls without asking a CPU meaning."""
    import megatron.core.tensor_parallel.random as megatron_random  # noqa: PLC0415  heavy, and only wanted on CPU

    stream = _DoneStream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # then `device=torch.cuda.current_device()` just works
    cuda.current_stream = lambda device=None: stream  # param_and_grad_buffer.py waits before it reduces
    cuda.synchronize = lambda device=None: None  # p2p_communication.py after batched sends
    # Per-rank random streams live in the default generator. Left alone, torch queues these calls for a CUDA start that
    # never comes, and every tensor-parallel rank silently draws the same numbers.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.default_generator.get_state()
    # Megatron's own setter writes to torch.cuda.default_generators, which is empty here
    megatron_random._set_cuda_rng_state = _set_default_rng_state


def _replace_cuda_kernels() -> None:
    """Give Megatron's optimizers what they have where no Transformer Engine is installed.

    With it they take its Adam and its kernels over lists of tensors, whatever device the tensors are on.
    """
    from megatron.core import optimizer as optimizers  # noqa: PLC0415  heavy, and only wanted on CPU
    from megatron.core import utils  # noqa: PLC0415
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer  # noqa: PLC0415

    every: Any = (optimizers, clip_grads, distrib_optimizer, optimizer)
    optimizers, clip_grads, distrib_optimizer, optimizer = every
    optimizers.Adam, optimizers.SGD, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = utils.local_multi_tensor_l2_norm, None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _set_default_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    """Megatron's setter also takes a device and a graph-safety flag, which mean nothing on CPU."""
    torch.default_generator.set_state(new_state)


def torch_adam_prepare_load(optimizer: Any) -> None:
    """Let a fresh distributed optimizer describe and load its state.

    Upstream cause (megatron-core 0.19.2, distrib_optimizer.py): ``sharded_state_dict`` asserts that exactly one Adam
    step is known, but torch's Adam has no state before its first step; and the loader walks torch's own "step" tensor
    as if it were a sharded moment (KeyError 'step'). A None entry is what the loader skips.
    Can go when ``tests/mcore/test_compat.py::test_distributed_optimizer_loads_torch_adam`` passes without this call.
    """
    for part in _parts(optimizer):
        if not hasattr(part, "_set_main_param_and_optimizer_states"):
            continue
        part._init_optimizer_states_with_dummy_values()
        original = part._set_main_param_and_optimizer_states
        part._set_main_param_and_optimizer_states = lambda param, tensors, _set=original: _set(
            param, {"step": None, **tensors}
        )


def torch_adam_finish_load(optimizer: Any) -> None:
    """Give each parameter its own Adam step counter after a load.

    Upstream cause (megatron-core 0.19.2, distrib_optimizer.py): after loading, all parameters share one "step" tensor,
    and torch's Adam increments it once per parameter, so bias correction is silently wrong from the second step on.
    Can go when ``tests/mcore/test_compat.py::test_adam_steps_are_not_shared_after_load`` passes without this call.
    """
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def take_weights_of(optimizer: Any) -> None:
    """Round the model's weights from the optimizer's float32 ones, as every step does at its end.

    Upstream cause (megatron-core 0.19.2): loading fills both on their own. Where one run keeps bf16 weights and the
    other 8-bit ones, the model would go by what the other had until its next step: not the run that was saved.
    Can go when ``tests/mcore/test_primary_weights.py::test_a_checkpoint_goes_on`` passes without this call.
    """
    for part in _parts(optimizer):
        if hasattr(part, "start_param_sync_for_bucket_group_subset"):
            part._copy_main_params_to_model_params()
            part.start_param_sync_for_bucket_group_subset()


def whole_numbers() -> TorchDistLoadShardedStrategy:
    """Read a checkpoint into tensors of the type that 8-bit weights go by; the model rounds each of them once, whole.

    Upstream cause (megatron-core 0.19.2, strategies/torch.py): by default each piece that is read is rounded into its
    place at once. Pieces of one weight, gate and up or what other ranks had written, share its scale, so that all of
    them get the last one's: weights come back wrong by the ratio of their largest numbers, without an error.
    Can go when ``tests/mcore/test_primary_weights.py::test_a_reference_follows_and_comes_back`` passes without it.
    """
    return TorchDistLoadShardedStrategy(stream_ckpt_dequant=False)


def keep_bucket_padding(optimizer: Any) -> None:
    """Let the distributed optimizer write the state of every parameter from where it lies.

    Upstream cause (megatron-core 0.19.2, distrib_optimizer.py): ``get_parameter_state_dp_zero`` leaves out the padding
    at the end of each gradient bucket, and ``sharded_param_state_fully_reshardable`` cuts its result at places that
    count it. Every parameter behind the first padded bucket is saved shifted, without an error: a tied model's last
    pipeline stage, or any model whose buckets do not come out even over the data-parallel ranks.
    Can go when ``tests/mcore/test_compat.py::test_state_behind_a_padded_bucket_is_saved_in_place`` passes without it.
    """
    for part in _parts(optimizer):
        if not hasattr(part, "get_parameter_state_dp_zero") or "get_parameter_state_dp_zero" in vars(part):
            continue
        original = part.get_parameter_state_dp_zero
        part.get_parameter_state_dp_zero = lambda *args, _part=part, _get=original, **kwargs: _with_padding(
            _part.buffers, _get(*args, **kwargs)
        )


def _with_padding(buffers: Any, state: dict | None) -> dict | None:
    if state is None:  # this rank writes nothing
        return None
    for number, buffer in enumerate(buffers):
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        for tensors in state[number].values():
            for key, whole in tensors.items():
                if isinstance(whole, torch.Tensor):
                    parts = zip(whole.split(sizes), padding, strict=True)
                    tensors[key] = torch.cat([torch.nn.functional.pad(part, (0, pad)) for part, pad in parts])
    return state


def write_in_this_process() -> None:
    """Let a save hand its results over in this process, where it is written anyway.

    Upstream cause (megatron-core 0.19.2, filesystem_async.py): results go through a queue of a manager process, also
    where nothing is asynchronous. That process takes seconds to start, and a signal to the rank's process group, with
    which schedulers and torchrun ask for a last checkpoint, ends it: the checkpoint then fails.
    Can go when ``tests/mcore/test_compat.py::test_a_save_starts_no_process`` passes without this call.
    """
    module: Any = filesystem_async
    module._results_queue = queue.Queue()  # of the next save alone: two may be under way


def _parts(optimizer: Any) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])
