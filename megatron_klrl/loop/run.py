"""The loop of a training run."""

import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_klrl.config.load import dump_recipe
from megatron_klrl.loop import details, optimum, reference, rollout_file
from megatron_klrl.loop.buffer import RolloutBuffer
from megatron_klrl.loop.checkpoints import REFERENCE, WAITING, Checkpoints, RunState, read_state
from megatron_klrl.loop.evaluation import evaluate
from megatron_klrl.loop.export import write_hf_folder
from megatron_klrl.loop.parts import Parts, Writing
from megatron_klrl.loop.producer import Producer
from megatron_klrl.loop.record import RunRecord, point_text
from megatron_klrl.loop.refit import due, refit
from megatron_klrl.loop.rollout import collate
from megatron_klrl.loop.samples import records
from megatron_klrl.loop.step import train_on
from megatron_klrl.metrics import step as step_metrics
from megatron_klrl.runtime.step_bound import StepBound
from megatron_klrl.runtime.stop import StopRequest, write_unfinished
from megatron_klrl.tracking.card import Card
from megatron_klrl.tracking.console import RunConsole

_SAMPLES_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What can end a run before its last step.

    Attributes:
        stop: whether this rank was asked to stop.
        bound: on the time of each step.
    """

    stop: StopRequest
    bound: StepBound


class Run:
    """One training run on this rank; every rank runs the same code, rank 0 also keeps the record.

    Order of a step (docs/guide/one-step.md): sample, verify, score, update, push weights; then evaluate and checkpoint
    where due.
    """

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        *,
        console: RunConsole,
        tokenizer: PreTrainedTokenizerBase,
        source: Path,
        facts: Mapping[str, str],
        checkpoints: Checkpoints,
        ends: Ends,
    ) -> None:
        """Take the parts; where the run goes on from a checkpoint, load it and push its weights into the engine.

        Args:
            parts: of the run.
            run_dir: exists.
            console: of this rank.
            tokenizer: decodes samples.
            source: Hugging Face folder whose configuration and tokenizer the export copies.
            facts: what runs, for the card: a biased KL configuration is marked there from the start.
            checkpoints: of the run; they know from which one it goes on.
            ends: what can end it before its last step.
        """
        self.parts, self.run_dir, self._console = parts, run_dir, console
        self._tokenizer, self._source, self._facts = tokenizer, source, facts
        self._ends, self._bound = ends, ends.bound
        self._producer = Producer(parts, next_prompt=0)
        loop = parts.recipe.loop
        self._buffer = RolloutBuffer(self._producer, max_staleness=loop.max_staleness, last_step=loop.steps)
        self._checkpoints, found = checkpoints, checkpoints.resumed
        self.state = self._fresh() if found is None else self._restore(found)
        self._has_refitted = found is not None
        self._saved = self.state.step
        self.record = None
        if parts.world.is_main:
            self._checkpoints.sweep()
            self.record = RunRecord(run_dir, first_step=self.state.step, console=console)
            self.record.card(Card(facts={**facts, "steps": "running"}), step=self.state.step)

    def _fresh(self) -> RunState:
        found = reference.checksum(self.parts)
        return RunState(step=0, weight_version=0, reference_checksum=found)

    def _restore(self, folder: Path) -> RunState:
        state = read_state(folder)
        self.parts.trainer.load(folder)
        self.parts.trainer.step = state.updates
        if state.reference_step:
            self.parts.trainer.load_reference(folder / REFERENCE)
        reference.check(self.parts, folder, state.reference_checksum)
        self._producer.next_prompt = state.next_prompt
        if (folder / WAITING).exists():
            self._buffer.restore(rollout_file.read(folder / WAITING, self.parts.task))
        refit(self.parts, version=state.weight_version, verify=True)
        self._console.say(f"  resumed from {folder} at step {state.step}")
        return state

    def train(self) -> int:
        """Run from the current state to the last step, or to the one after which the ranks were asked to stop.

        Returns:
            The signal that asked them, after a checkpoint; 0 at the end of the run.
        """
        self._offload()
        asked = self._asked_to_stop()
        with self._bound:
            if not asked and self.state.step == 0:
                self._bound.begin("the evaluation of the untouched model")
                self._start()
            if not asked:
                asked = self._train_steps()
            if asked and self._saved < self.state.step:
                self.checkpoint({})
            self._finish_checkpoint()
        return asked

    def _train_steps(self) -> int:
        loop = self.parts.recipe.loop
        with self._console.training(first_step=self.state.step):
            for step in range(self.state.step + 1, loop.steps + 1):
                with self.parts.timers.places.within(f"step {step}"):
                    asked = self._asked_to_stop()  # where a rank waits for the first one, which still writes
                    if asked:
                        return asked
                    self._one(step)
        return 0

    def _one(self, step: int) -> None:
        loop, bound, places = self.parts.recipe.loop, self._bound, self.parts.timers.places
        bound.begin(f"step {step}")
        values, found = self._step(step), {}
        if _due(step, loop.eval_every, loop.steps):
            bound.begin(f"the evaluation after step {step}")
            with places.within("evaluation"):
                found = evaluate(self.parts)
        if self.record:
            self.record.step(step, values, found)
        if _due(step, loop.checkpoint_every, loop.steps):
            self.checkpoint(values | found)

    def _asked_to_stop(self) -> int:
        """The signal by which any rank was asked to; 0 if none was. Collective: signals reach some ranks, some time.

        A checkpoint whose files all ranks have written meanwhile is completed.
        """
        number, not_written = self._ends.stop.number, int(not self._checkpoints.is_written)
        found = torch.tensor([number, not_written], dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if not found[1]:
            self._finish_checkpoint()
        return int(found[0])

    def _finish_checkpoint(self) -> None:
        self._bound.begin("the end of a checkpoint")
        with self.parts.timers.places.within("checkpoint"):
            self._checkpoints.finish()

    def _start(self) -> None:
        """Evaluation of the untouched model, and the reference samples of the optimum report."""
        if self.parts.evaluation:
            with self._console.phase("evaluation of the untouched model"):
                found = evaluate(self.parts)
            if self.record:
                self.record.step(0, {}, found)
        spec = self.parts.recipe.optimum
        if spec.prompts and self.parts.recipe.has_reference:
            rates = optimum.success_rates(optimum.sample_for_optimum(self.parts), samples=spec.samples)
            self.state = replace(self.state, reference_rates=tuple(rates))

    def _step(self, step: int) -> dict[str, float]:
        parts, timers, loop = self.parts, self.parts.timers, self.parts.recipe.loop
        beta = parts.beta_rule.beta(step, self.state.beta_learnt)
        with timers.span("step"):
            with timers.phase("generate"):
                dropped = self._buffer.fill(step, weight_version=self.state.weight_version)
            produced = self._buffer.take(step)
            parts.engine.sleep()
            batch = collate(produced.rollouts, device=parts.world.device)
            values = step_metrics.of_rollouts(batch, weight_version=self.state.weight_version)
            every = loop.split_gradient_every
            split = beta > 0 and every > 0 and step % every == 0
            metrics, scores = train_on(batch, parts, beta=beta, split_gradient=split)
            moved = reference.after_step(parts, step=step)
            self._offload()
            with timers.phase("sync"):
                version = self.state.weight_version + 1
                first = not self._has_refitted
                verified = refit(parts, version=version, verify=due(parts.recipe, version=version, first=first))
                self._has_refitted = True
        values |= metrics | verified
        values["reward/equal_groups"] = produced.equal_groups
        values["response/sampling_rounds"] = produced.rounds
        values["reward/verifier_timeouts"] = produced.verifier_timeouts
        values["reward/verifier_errors"] = produced.verifier_errors
        values["staleness/dropped"] = dropped
        if "kl/exact" in values:
            values["kl/reference_step"] = self.state.reference_step
            values["objective/mean"] = values["reward/mean"] - beta * values["kl/exact"]
        self.state = replace(
            self.state,
            step=step,
            updates=parts.trainer.step,
            weight_version=version,
            next_prompt=self._producer.next_prompt,
            beta_learnt=parts.beta_rule.learn(beta, values.get("kl/exact", 0.0)),
            reference_step=step if moved else self.state.reference_step,
        )
        if self.record:
            found = records(produced.rollouts, batch, scores, self._tokenizer, count=_SAMPLES_KEPT)
            self.record.samples(step, found)
            if details.due(step, steps=loop.steps):
                self.record.details(step, details.details(produced.rollouts, batch, scores, self._tokenizer))
        measured = timers.take()
        values["throughput/tokens_per_s"] = float(batch.lengths.sum()) / measured["time/step_s"]
        return values | measured

    def checkpoint(self, values: Mapping[str, float]) -> None:
        """Write a checkpoint of the current state, with what was measured in its step; collective."""
        self._bound.begin(f"the checkpoint of step {self.state.step}")
        with self.parts.timers.places.within("checkpoint"):
            if self.state.reference_step:
                self.state = replace(self.state, reference_checksum=reference.checksum(self.parts))
            recipe = self.parts.recipe
            self._checkpoints.begin(self.state, dump_recipe(recipe), self._write_tensors, values=values)
            if not recipe.checkpoint.asynchronous:
                self._checkpoints.finish()
            self._saved = self.state.step
            self._offload()

    def _offload(self) -> None:
        """Where wanted, what only an update needs goes before the engine takes memory again."""
        if self.parts.recipe.memory.offload_while_generating:
            self.parts.trainer.offload()

    def _write_tensors(self, folder: Path) -> list[Writing]:
        under_way = []
        if self.parts.recipe.checkpoint.asynchronous:
            under_way.append(self.parts.trainer.begin_save(folder))
        else:
            self.parts.trainer.save(folder)
        if self.state.reference_step:
            within = folder / REFERENCE
            if self.parts.world.is_main:
                within.mkdir()
            dist.barrier()
            self.parts.trainer.save_reference(within)
        if self.parts.world.is_main and self._buffer.waiting:
            rollout_file.write(folder / WAITING, self._buffer.waiting)
        return under_way

    def leave_unfinished(self, asked: int) -> None:
        """Say, in a file, on the card and to the user, that the run stopped in good order before its end.

        Args:
            asked: signal that asked for it.
        """
        if self.record is None:
            return
        steps, by = self.parts.recipe.loop.steps, signal.Signals(asked).name
        write_unfinished(self.run_dir, step=self.state.step, steps=steps, number=asked)
        stopped = f"stopped at step {self.state.step} of {steps} by {by}"
        self.record.card(Card(facts={**self._facts, "steps": stopped}), step=self.state.step)
        self.record.close()
        saved = self._checkpoints.folder(self.state.step)
        kept = f"checkpoint {saved}" if saved.exists() else "no checkpoint yet"
        self._console.say(f"{stopped}, {kept}; go on with --resume --run-dir {self.run_dir}")

    def export(self) -> Path:
        """Write the policy as a Hugging Face folder, in place of what an earlier end of this run left; collective."""
        to = self.run_dir / "hf"
        if self.record is not None:
            shutil.rmtree(to, ignore_errors=True)
        write_hf_folder(self.parts.trainer.export_weights(), source=self._source, to=to, writes=self.record is not None)
        return to

    def finish(self, exported: Path) -> None:
        """Optimum report and run card; collective.

        Args:
            exported: the Hugging Face folder of the result.
        """
        report = None
        if self.state.reference_rates:
            report = optimum.report(self.parts, reference_rates=self.state.reference_rates)
        if self.record is None:
            return
        self.record.audit(self.parts.recipe.kl)
        self.record.settings(self.parts.recipe)
        self.record.frontier(self.state.reference_rates, beta=self.parts.recipe.kl.beta, step=self.state.step)
        results = {"steps": str(self.state.step), "result": str(exported)}
        if self.state.reference_checksum:
            since = f"step {self.state.reference_step}" if self.state.reference_step else "its folder"
            results["reference"] = f"as of {since}, checksum {self.state.reference_checksum}"
        if report is not None:
            self.record.optimum(report)
            results["reached"] = point_text(report.reached)
            if report.optimal is not None:
                results["optimum, closed form"] = point_text(report.optimal)
        self.record.card(Card(facts={**self._facts, **results}), step=self.state.step)
        self.record.close()


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
