"""vLLM inside the training rank: sampling, and weights pushed in memory."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.generation import vllm_host
from megatron_klrl.generation.engine import Completion, Memory, Request, Sampling, Ticket
from megatron_klrl.generation.refit import Intake, RefitReport, tensor_sizes
from megatron_klrl.generation.vllm_queue import RequestQueue
from megatron_klrl.generation.watchdog import Watchdog
from megatron_klrl.runtime.world import World

_IDLE_S = 0.001  # pause after a step without a new token: nothing happens sooner
_SHARE_OF_FREE = 0.9  # the trainer's activations and logits come later, and need the rest
_DISCARD_BOTH = 2  # vLLM's sleep level that keeps neither weights nor cache: the weights are pushed anew in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine runs.

    Attributes:
        tensor: ranks of one engine.
        dtype: of weights and activations, and of every weight update.
        max_model_len: longest prompt plus response, tokens.
        max_num_seqs: requests that run at the same time.
        kv_cache_bytes: of the key-value cache per rank; None lets vLLM decide.
        timeout_s: longest time in a call without a new token, seconds.
        sleeps: ``sleep`` gives memory back; CUDA only.
        quantised: weights are rounded to 8 bits as they arrive; CUDA only.
    """

    tensor: int
    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int | None
    timeout_s: float
    sleeps: bool
    quantised: bool = False


def _options(settings: EngineSettings, *, device: torch.device) -> dict[str, Any]:
    """Arguments of vLLM that not every engine has."""
    options: dict[str, Any] = {"dtype": str(settings.dtype).removeprefix("torch.")}
    if settings.sleeps:
        options["enable_sleep_mode"] = True
    if settings.quantised:
        options["quantization"] = "fp8"
    if settings.kv_cache_bytes is not None:
        options["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        options["gpu_memory_utilization"] = memory_share(free, total=total)
    return options


def memory_share(free: int, *, total: int) -> float:
    """The part of a GPU's memory that vLLM is told it may have, of what others have left.

    vLLM refuses to start unless that part is free, even where the size of its cache is given; its own default, nine
    tenths, never is beside a trainer. Where no size is given, the cache takes what this leaves.

    Args:
        free: bytes.
        total: bytes.
    """
    return _SHARE_OF_FREE * free / total


class VLLMEngine:
    """One vLLM engine over ``tensor`` neighbouring ranks, hosted by the ranks themselves.

    Every rank of the world constructs its engine at the same time (vLLM creates process groups over the whole world),
    and the ranks of one engine make the same calls with the same requests. The order of calls is that of
    ``GenerationEngine``.
    """

    def __init__(self, *, folder: Path, world: World, settings: EngineSettings) -> None:
        """Start an engine with the weights of a folder.

        Args:
            folder: Hugging Face folder.
            world: this rank's place.
            settings: of the engine.

        Raises:
            UserError: the settings do not fit each other or the machine.
        """
        vllm_host.prepare()
        from vllm import LLM  # noqa: PLC0415  13 CPU seconds, and the environment must be set first

        vllm_host.mend_vllm()
        options = _options(settings, device=world.device)
        environment = vllm_host.launcher_environment(rank=world.rank, local_rank=world.local_rank, size=world.size)
        with vllm_host.trainer_state_kept(), environment:
            try:
                self._llm: Any = LLM(
                    model=str(folder),
                    distributed_executor_backend="external_launcher",
                    tensor_parallel_size=settings.tensor,
                    enforce_eager=world.device.type == "cpu",
                    max_model_len=settings.max_model_len,
                    max_num_seqs=settings.max_num_seqs,
                    skip_tokenizer_init=True,
                    disable_log_stats=True,
                    seed=0,
                    logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
                    async_scheduling=False,  # a token in flight would be drawn from weights that are no longer there
                    **options,
                )
            except ValueError as error:
                raise UserError(
                    f"vLLM did not start: {error}",
                    field="generation",
                    fix="change generation.kv_cache_mib, generation.max_model_len or generation.max_num_seqs",
                ) from error
        self._settings, self._expected = settings, tensor_sizes(folder)
        self._queue = RequestQueue(self._llm.llm_engine)
        self._complete, self._asleep, self._cache_is_suspect = True, set[Memory](), False
        self.weight_version = 0

    # -- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete every request, in order. See ``GenerationEngine``.

        Raises:
            UserError: a prompt leaves no room for a response.
            WorkError: the engine holds no complete weights or is asleep; no new token came for ``timeout_s``. The
                engine forgets the requests and can be used again.
        """
        self._check_alone("generate")
        if not requests:
            return []
        found: dict[Ticket, Completion] = {}
        with self._leaving_nothing_behind(), Watchdog(phase="generate", timeout_s=self._settings.timeout_s) as watchdog:
            tickets = self.submit(requests, sampling)
            while len(self._queue):
                finished, new = self._queue.step(version=self.weight_version)
                found |= finished
                self._note(watchdog, new + len(finished))
        return [found[ticket] for ticket in tickets]

    def score(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """Log-probabilities of given tokens at temperature 1. See ``GenerationEngine``."""
        self._check_alone("score")
        self._check_room(max((len(row) for row in rows), default=0), response=1)
        with self._leaving_nothing_behind(), Watchdog(phase="score", timeout_s=self._settings.timeout_s):
            return self._queue.score(rows)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Ticket]:
        """Queue requests. See ``GenerationEngine``."""
        self._check_ready()
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        self._check_room(longest, response=sampling.max_tokens)
        with vllm_host.trainer_state_kept():
            return self._queue.submit(requests, sampling, version=self.weight_version)

    def step(self) -> dict[Ticket, Completion]:
        """Advance open requests. See ``GenerationEngine``."""
        self._check_ready()
        if not len(self._queue):
            return {}
        with self._leaving_nothing_behind(), Watchdog(phase="step", timeout_s=self._settings.timeout_s):
            return self._queue.step(version=self.weight_version)[0]

    def abort(self, tickets: Sequence[Ticket]) -> dict[Ticket, Completion]:
        """Drop open requests. See ``GenerationEngine``."""
        return self._queue.abort(tickets)

    def _note(self, watchdog: Watchdog, achieved: int) -> None:
        if achieved:
            watchdog.progress()
            return
        if watchdog.stalled():
            raise WorkError(
                f"generate: no new token for {self._settings.timeout_s:g} s: {self._queue.describe()}. If none runs, a "
                "sequence does not fit into generation.kv_cache_mib, or vLLM's scheduler is paused; if some run, look "
                "at the load of this machine and raise generation.timeout_s if steps are that slow"
            )
        time.sleep(_IDLE_S)

    def _check_ready(self) -> None:
        if self._asleep:
            raise WorkError(f"the generation engine sleeps: wake {' and '.join(sorted(self._asleep))} before sampling")
        if not self._complete:
            raise WorkError("the generation engine holds incomplete weights: push all weights again before sampling")

    def _check_alone(self, call: str) -> None:
        self._check_ready()
        if len(self._queue):
            raise WorkError(f"{call} while {len(self._queue)} submitted requests are open: step or abort them first")

    def _check_room(self, longest: int, *, response: int) -> None:
        if longest >= self._settings.max_model_len:
            raise UserError(
                f"a prompt of {longest} tokens leaves no room for a response in {self._settings.max_model_len}",
                field="generation.max_model_len",
                fix=f"set it to {longest + response} or more, or leave such prompts out of the data",
            )

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        """The trainer's state is kept; after an error no request stays behind."""
        with vllm_host.trainer_state_kept():
            try:
                yield
            except BaseException:
                self._queue.clear()
                self._cache_is_suspect = True
                raise

    # -- weights ---------------------------------------------------------------------------------------------------

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, version: int, verify: bool = False
    ) -> RefitReport:
        """Replace all weights. See ``GenerationEngine``.

        Raises:
            WorkError: a tensor is missing, unknown, repeated, of another shape or number format, or not finite; or the
                weights are asleep. The engine refuses to sample until a complete update.
        """
        if Memory.WEIGHTS in self._asleep:
            raise WorkError("the generation engine sleeps: wake its weights before updating them")
        self._complete = False
        intake = Intake(self._expected, dtype=self._settings.dtype, takes_checksums=verify)
        model = self._runner().get_model()  # the model itself, whatever graphs are captured around it
        with torch.no_grad(), vllm_host.trainer_state_kept():
            try:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": intake.check(weights)})
            except BaseException:
                vllm_host.roll_back_reload(model)
                raise
            vllm_host.repack_tied_head(model)
            # KV computed with the old weights would silently condition new tokens
            if not self._llm.reset_prefix_cache(reset_running_requests=True):
                raise WorkError("vLLM kept cached prefixes of the old weights")
            if self._cache_is_suspect:
                vllm_host.blank_caches(self._runner())
        self.weight_version = version
        self._complete, self._cache_is_suspect = True, False
        return intake.report(version=version)

    # -- memory ----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give the memory of weights and cache back. See ``GenerationEngine``.

        Raises:
            WorkError: requests are open: their cache would be gone.
        """
        if not self._settings.sleeps or self._asleep:
            return
        self._check_alone("sleep")
        with vllm_host.trainer_state_kept():
            self._llm.llm_engine.sleep(level=_DISCARD_BOTH)
        self._asleep, self._complete = set(Memory), False

    def wake(self, memory: Memory) -> None:
        """Take memory back. See ``GenerationEngine``."""
        if memory not in self._asleep:
            return
        with vllm_host.trainer_state_kept():
            self._llm.llm_engine.wake_up([str(memory)])
        self._asleep.remove(memory)

    def close(self) -> None:
        """Drop the engine and its memory."""
        self._llm, self._queue = None, RequestQueue(None)
        self._complete = False
        gc.collect()

    def _runner(self) -> Any:
        worker = self._llm.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner
