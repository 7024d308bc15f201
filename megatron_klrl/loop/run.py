"""The loop of a training run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_klrl.config.load import dump_recipe
from megatron_klrl.loop import checkpoints, optimum
from megatron_klrl.loop.checkpoints import RunState
from megatron_klrl.loop.evaluation import evaluate
from megatron_klrl.loop.export import write_hf_folder
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.record import RunRecord, point_text
from megatron_klrl.loop.refit import due, refit
from megatron_klrl.loop.rollout import Rollouts, collate, rollouts
from megatron_klrl.loop.samples import records
from megatron_klrl.loop.step import train_on
from megatron_klrl.metrics import step as step_metrics
from megatron_klrl.runtime.memory import peak_gib
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
        self.state = self._restore() if resume else RunState(step=0, weight_version=0)
        self._has_refitted = resume
        self.record = None
        if parts.world.is_main:
            self.record = RunRecord(run_dir, first_step=self.state.step, console=console)
            self.record.card(Card(facts={**facts, "steps": "running"}), step=self.state.step)

    def _restore(self) -> RunState:
        folder = checkpoints.newest(self.run_dir / "checkpoints")
        state = checkpoints.read_state(folder)
        self.parts.trainer.load(folder)
        self.parts.trainer.step = state.step
        refit(self.parts, version=state.weight_version, verify=True)
        self._console.say(f"  resumed from {folder} at step {state.step}")
        return state

    def train(self) -> None:
        """Run from the current state to the last step."""
        loop = self.parts.recipe.loop
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
        if spec.prompts and self.parts.recipe.kl.beta > 0:
            rates = optimum.success_rates(optimum.sample_for_optimum(self.parts), samples=spec.samples)
            self.state = replace(self.state, reference_rates=tuple(rates))

    def _step(self, step: int) -> dict[str, float]:
        parts, timers = self.parts, self.parts.timers
        with timers.span("step"):
            with timers.span("generate"):
                found = self._rollouts(step)
            parts.engine.sleep()
            batch = collate(found, device=parts.world.device)
            values = step_metrics.of_rollouts(batch, weight_version=self.state.weight_version)
            every = parts.recipe.loop.split_gradient_every
            split = parts.recipe.kl.beta > 0 and every > 0 and step % every == 0
            metrics, scores = train_on(batch, parts, split_gradient=split)
            with timers.span("sync"):
                version = self.state.weight_version + 1
                first = not self._has_refitted
                verified = refit(parts, version=version, verify=due(parts.recipe, version=version, first=first))
                self._has_refitted = True
        self.state = replace(self.state, step=step, weight_version=version)
        if self.record:
            self.record.samples(step, records(found, batch, scores, self._tokenizer, count=_SAMPLES_KEPT))
        times = timers.take()
        tokens = float(batch.lengths.sum())
        values |= metrics | verified | times
        values["throughput/tokens_per_s"] = tokens / times["time/step_s"]
        values["memory/peak_gib"] = peak_gib()
        if "kl/exact" in values:
            values["objective/mean"] = values["reward/mean"] - values["kl/beta"] * values["kl/exact"]
        return values

    def _rollouts(self, step: int) -> Rollouts:
        recipe = self.parts.recipe
        prompts = self.parts.task.prompts((step - 1) * recipe.loop.prompts_per_step, recipe.loop.prompts_per_step)
        return rollouts(
            self.parts,
            self.parts.task,
            prompts,
            samples=recipe.loop.group_size,
            temperature=recipe.generation.temperature,
            purpose=("rollout", step),
            top_p=recipe.generation.top_p,
            top_k=recipe.generation.top_k,
        )

    def checkpoint(self) -> Path:
        """Write a checkpoint of the current state; collective."""
        return checkpoints.save(
            self.run_dir / "checkpoints", self.state, dump_recipe(self.parts.recipe), self.parts.trainer.save
        )

    def export(self) -> Path:
        """Write the policy as a Hugging Face folder; collective."""
        to = self.run_dir / "hf"
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
        results = {"steps": str(self.state.step), "result": str(exported)}
        if report is not None:
            self.record.optimum(report)
            results["reached"] = point_text(report.reached)
            results["optimum, closed form"] = point_text(report.optimal)
        self.record.card(Card(facts={**self._facts, **results}), step=self.state.step)
        self.record.close()


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
