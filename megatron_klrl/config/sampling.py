"""What sampling does to the objective."""

from megatron_klrl.config.recipe import GenerationSection, LoopSection

LOWEST_TEMPERATURE = 0.01
"""vLLM silently samples at this temperature where a lower one above 0 is asked for."""


def truncation(generation: GenerationSection) -> str | None:
    """Why training rollouts are not the policy's samples, in one sentence; None when they are.

    Cutting tokens off and renormalising gives another distribution than the softmax that is trained. Importance weights
    cannot undo it: what is never sampled has no weight.
    """
    cuts = [f"top_p {generation.top_p:g}"] if generation.top_p < 1 else []
    cuts += [f"top_k {generation.top_k}"] if generation.top_k is not None else []
    if not cuts:
        return None
    return (
        f"rollouts with {' and '.join(cuts)} come from a truncated distribution, not from the policy: the gradients "
        "of reward and KL are those of neither"
    )


def on_policy(loop: LoopSection) -> bool:
    """Whether every update trains on samples of exactly the policy that it changes."""
    return loop.max_staleness == 0 and loop.updates_per_batch == 1
