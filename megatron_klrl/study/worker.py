"""One worker of a study: ranks that start their engines once and serve one run after the other.

What makes the second run equal to one in a fresh process: the trainer is built anew; the engine gets the model's own
weights back, proven tensor by tensor, and forgets its prefixes; every generator starts from the run's seed; requests
carry seeds of their own. Whatever fails ends the worker, and the study starts another: an engine that has seen an error
serves nobody.
"""

import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_klrl.config.load import load_recipe
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.jobs import card_facts, step_bound
from megatron_klrl.launch.failure import Failure, kind_of, write_failure
from megatron_klrl.runtime.logs import log_file, stderr_into
from megatron_klrl.runtime.stop import StopRequest
from megatron_klrl.study.wire import Done, Order, read_order, recipe_of
from megatron_klrl.tracking.console import RunConsole

if TYPE_CHECKING:
    from megatron_klrl.build import Site
    from megatron_klrl.generation.vllm_engine import VLLMEngine


def serve(folder: Path, *, orders: TextIO, replies: TextIO) -> None:
    """Take orders until there are no more; every rank runs this, the first one reads and replies.

    Args:
        folder: of the worker; holds the recipe whose engines are started.
        orders: lines of `wire.Order`.
        replies: lines of `wire.Done`.
    """
    from megatron_klrl import build  # noqa: PLC0415  9 s of imports, which a command that only plans does without

    recipe = load_recipe(recipe_of(folder))
    with build.site(recipe) as place:
        engine: VLLMEngine | None = None
        while (order := _next(orders, place)) is not None:
            start = time.monotonic()
            engine, started_s = _serve_one(order, place, engine)
            if place.world.is_main:
                seconds = time.monotonic() - start - started_s
                replies.write(Done(run_dir=order.run_dir, seconds=seconds).to_line())
                replies.flush()
        if engine is not None:
            engine.close()


def _next(orders: TextIO, place: "Site") -> Order | None:
    import torch.distributed as dist  # noqa: PLC0415

    found = [read_order(orders.readline()) if place.world.is_main else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _serve_one(order: Order, place: "Site", engine: "VLLMEngine | None") -> tuple["VLLMEngine", float]:
    """One run, to its end; its failure is written into its folder before it ends this process."""
    run_dir, rank = Path(order.run_dir), place.world.rank
    with stderr_into(log_file(run_dir, rank)):
        try:
            return _run(order, run_dir, place, engine)
        except (UserError, WorkError) as error:
            failure = Failure(kind=kind_of(error), rank=rank, message=str(error))
            sys.stderr.write(traceback.format_exc())
        except Exception as error:  # noqa: BLE001  the boundary of the rank: whatever it is, the study must hear of it
            message = f"rank {rank}: {type(error).__name__}: {error} (traceback in {log_file(run_dir, rank)})"
            failure = Failure(kind="work", rank=rank, message=message)
            sys.stderr.write(traceback.format_exc())
        write_failure(run_dir, failure)
        sys.stderr.flush()
    # no way back through the engines: another rank may wait for this one in a collective
    os._exit(1)


def _run(order: Order, run_dir: Path, place: "Site", engine: "VLLMEngine | None") -> tuple["VLLMEngine", float]:
    from megatron_klrl import build  # noqa: PLC0415
    from megatron_klrl.loop.checkpoints import Checkpoints  # noqa: PLC0415
    from megatron_klrl.loop.refit import restart  # noqa: PLC0415
    from megatron_klrl.loop.run import Ends, Run  # noqa: PLC0415

    recipe = load_recipe(run_dir / "config.yaml")
    build.reseed(recipe)
    trainer = build.build_trainer(recipe, place)
    before, served = time.monotonic(), engine is not None
    engine = engine or build.build_engine(recipe, place)
    started_s = time.monotonic() - before
    parts = build.build_parts(recipe, place, trainer=trainer, engine=engine)
    checkpoints = Checkpoints(run_dir / "checkpoints", recipe.checkpoint)
    if order.resume:
        checkpoints.to_resume(lambda text: sys.stderr.write(f"{text}\n"))
    if served and checkpoints.resumed is None:
        restart(parts)
    run = Run(
        parts,
        run_dir,
        console=RunConsole(steps=recipe.loop.steps, quiet=True),
        tokenizer=place.tokenizer,
        source=place.folder,
        facts=card_facts(recipe, place, command=order.command),
        checkpoints=checkpoints,
        # nobody asks a worker to stop after a step: the study ends it, and goes on with the run from its checkpoint
        ends=Ends(stop=StopRequest(has_launcher=True), bound=step_bound(recipe, run_dir, parts)),
    )
    run.train()
    run.finish(run.export())
    trainer.close()
    del run, parts, trainer
    gc.collect()
    return engine, started_s
