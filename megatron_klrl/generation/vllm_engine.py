"""vLLM inside the training rank: sampling, and weights pushed in memory."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.generation import vllm_host
from megatron_klrl.generation.engine import Completion, Request, Sampling
from megatron_klrl.runtime.world import World


class VLLMEngine:
    """One vLLM engine over ``tensor`` neighbouring ranks, hosted by the ranks themselves.

    Every rank of the world constructs its engine at the same time (vLLM creates process groups over the whole world),
    and the ranks of one engine make the same calls with the same requests.
    """

    def __init__(
        self,
        *,
        folder: Path,
        world: World,
        tensor: int,
        dtype: torch.dtype,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_bytes: int | None,
    ) -> None:
        vllm_host.prepare()
        from vllm import LLM  # noqa: PLC0415  13 CPU seconds, and the environment must be set first

        vllm_host.keep_process_group()
        self._expected = _tensor_sizes(folder)
        options: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        if kv_cache_bytes is not None:
            options["kv_cache_memory_bytes"] = kv_cache_bytes
        environment = vllm_host.launcher_environment(rank=world.rank, local_rank=world.local_rank, size=world.size)
        with vllm_host.trainer_state_kept(), environment:
            try:
                self._llm: Any = LLM(
                    model=str(folder),
                    distributed_executor_backend="external_launcher",
                    tensor_parallel_size=tensor,
                    enforce_eager=world.device.type == "cpu",
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    skip_tokenizer_init=True,
                    disable_log_stats=True,
                    seed=0,
                    logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
                    **options,
                )
            except ValueError as error:
                raise UserError(
                    f"vLLM did not start: {error}",
                    field="generation",
                    fix="change generation.kv_cache_mib, generation.max_model_len or generation.max_num_seqs",
                ) from error
        self._usable, self._max_model_len = True, max_model_len
        self.weight_version = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete every request, in order. See ``GenerationEngine``."""
        if not self._usable:
            raise WorkError("the generation engine holds incomplete weights: push all weights again before sampling")
        if not requests:
            return []
        longest = max(len(request.prompt_ids) for request in requests)
        if longest >= self._max_model_len:
            raise UserError(
                f"a prompt of {longest} tokens leaves no room for a response in {self._max_model_len}",
                field="generation.max_model_len",
                fix=f"set it to {longest + sampling.max_tokens} or more, or leave such prompts out of the data",
            )
        from vllm import SamplingParams  # noqa: PLC0415

        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_ids),
                seed=request.seed,
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        try:
            with vllm_host.trainer_state_kept():
                outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        except BaseException:
            self._abort_all()
            raise
        return [self._completion(output.outputs[0]) for output in outputs]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace all weights. See ``GenerationEngine``.

        Raises:
            WorkError: a tensor is missing, unknown, repeated, of another shape, or not finite.
        """
        self._usable = False
        with torch.no_grad(), vllm_host.trainer_state_kept():
            try:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._checked(weights)})
            except BaseException:
                vllm_host.roll_back_reload(self._runner().model)
                raise
            vllm_host.repack_tied_head(self._runner().model)
            # KV computed with the old weights would silently condition new tokens
            if not self._llm.reset_prefix_cache(reset_running_requests=True):
                raise WorkError("vLLM kept cached prefixes of the old weights")
        self.weight_version = version
        self._usable = True

    def close(self) -> None:
        """Drop the engine and its memory."""
        self._llm = None
        self._usable = False
        gc.collect()

    def _runner(self) -> Any:
        worker = self._llm.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    def _completion(self, output: Any) -> Completion:
        logprobs = tuple(
            float(entry[token].logprob) for entry, token in zip(output.logprobs, output.token_ids, strict=True)
        )
        if any(value != value for value in logprobs):
            raise WorkError("vLLM returned NaN log-probabilities: the weights or the KV cache hold NaN")
        return Completion(
            token_ids=tuple(output.token_ids),
            logprobs=logprobs,
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            weight_version=self.weight_version,
        )

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors on, refusing what vLLM would swallow: a missing part leaves uninitialised memory, no error."""
        missing = dict(self._expected)
        for name, tensor in weights:
            size = missing.pop(name, None)
            if size is None:
                known = "twice" if name in self._expected else "but the engine's model has no such tensor"
                raise WorkError(f"weight update brings {name} {known}")
            if tuple(tensor.shape) != size:
                raise WorkError(f"weight update brings {name} as {tuple(tensor.shape)}, the engine's is {size}")
            if not bool(torch.isfinite(tensor).all()):
                raise WorkError(f"weight update brings {name} with values that are not finite")
            yield name, tensor
        if missing:
            raise WorkError(f"weight update lacks {len(missing)} tensors, {next(iter(missing))} first")

    def _abort_all(self) -> None:
        """Forget unfinished requests: left in the queue, they make the next call loop for ever."""
        engine = self._llm.llm_engine
        unfinished = list(engine.output_processor.request_states)
        if unfinished:
            engine.abort_request(unfinished, internal=True)


def _tensor_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face folder."""
    sizes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            sizes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118  no mapping
    return sizes
