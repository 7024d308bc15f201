"""The loop of a training run."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_klrl.config.load import dump_recipe
from megatron_klrl.loop import checkpoints, details, optimum, reference, rollout_file
from megatron_klrl.loop.buffer import RolloutBuffer
from megatron_klrl.loop.checkpoints import RunState
from megatron_klrl.loop.evaluation import evaluate
from megatron_klrl.loop.export import write_hf_folder
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.producer import Producer
from megatron_klrl.loop.record import RunRecord, point_text
from megatron_klrl.loop.refit import due, refit
from megatron_klrl.loop.rollout import collate
from megatron_klrl.loop.samples import records
from megatron_klrl.loop.step import train_on
from megatron_klrl.metrics import step as step_metrics
from megatron_klrl.tracking.card import Card
from megatron_klrl.tracking.console import RunConsole

_SAMPLES_KEPT = 8


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
        resume: bool,
    ) -> None:
        """Take the parts; on resume, load the newest checkpoint and push its weights into the engine.

        Args:
            parts: of the run.
            run_dir: exists.
            console: of this rank.
            tokenizer: decodes samples.
            source: Hugging Face folder whose configuration and tokenizer the export copies.
            facts: what runs, for the card: a biased KL configuration is marked there from the start.
            resume: go on from the newest complete checkpoint.
        """
        self.parts, self.run_dir, self._console = parts, run_dir, console
        self._tokenizer, self._source, self._facts = tokenizer, source, facts
        self._producer = Producer(parts, next_prompt=0)
        loop = parts.recipe.loop
        self._buffer = RolloutBuffer(self._producer, max_staleness=loop.max_staleness, last_step=loop.steps)
        self.state = self._restore() if resume else self._fresh()
        self._has_refitted = resume
        self.record = None
        if parts.world.is_main:
            self.record = RunRecord(run_dir, first_step=self.state.step, console=console)
            self.record.card(Card(facts={**facts, "steps": "running"}), step=self.state.step)

    def _fresh(self) -> RunState:
        found = reference.checksum(self.parts)
        return RunState(step=0, weight_version=0, reference_checksum=found)

    def _restore(self) -> RunState:
        folder = checkpoints.newest(self.run_dir / "checkpoints")
        state = checkpoints.read_state(folder)
        self.parts.trainer.load(folder)
        self.parts.trainer.step = state.updates
        if state.reference_step:
            self.parts.trainer.load_reference(folder / checkpoints.REFERENCE)
        reference.check(self.parts, folder, state.reference_checksum)
        self._producer.next_prompt = state.next_prompt
        if (folder / checkpoints.WAITING).exists():
            self._buffer.restore(rollout_file.read(folder / checkpoints.WAITING, self.parts.task))
        refit(self.parts, version=state.weight_version, verify=True)
        self._console.say(f"  resumed from {folder} at step {state.step}")
        return state

    def train(self) -> None:
        """Run from the current state to the last step."""
        loop = self.parts.recipe.loop
        self._offload()
        if self.state.step == 0:
            self._start()
        with self._console.training(first_step=self.state.step):
            for step in range(self.state.step + 1, loop.steps + 1):
                values = self._step(step)
                found = evaluate(self.parts) if _due(step, loop.eval_every, loop.steps) else {}
                if self.record:
                    self.record.step(step, values, found)
                if _due(step, loop.checkpoint_every, loop.steps):
                    self.checkpoint()

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

    def checkpoint(self) -> Path:
        """Write a checkpoint of the current state; collective."""
        if self.state.reference_step:
            self.state = replace(self.state, reference_checksum=reference.checksum(self.parts))
        root, recipe = self.run_dir / "checkpoints", dump_recipe(self.parts.recipe)
        written = checkpoints.save(root, self.state, recipe, self._write_tensors)
        self._offload()
        return written

    def _offload(self) -> None:
        """Where wanted, what only an update needs goes before the engine takes memory again."""
        if self.parts.recipe.memory.offload_while_generating:
            self.parts.trainer.offload()

    def _write_tensors(self, folder: Path) -> None:
        self.parts.trainer.save(folder)
        if self.state.reference_step:
            within = folder / checkpoints.REFERENCE
            if self.parts.world.is_main:
                within.mkdir()
            dist.barrier()
            self.parts.trainer.save_reference(within)
        if self.parts.world.is_main and self._buffer.waiting:
            rollout_file.write(folder / checkpoints.WAITING, self._buffer.waiting)

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
