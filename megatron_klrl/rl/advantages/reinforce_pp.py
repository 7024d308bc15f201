"""REINFORCE++: rewards standardised over the whole batch."""

from torch import Tensor

from megatron_klrl.rl.advantages.groups import grouped, standardised

BATCH_STD_EPS = 1e-8
"""Added to the standard deviation of a batch, in units of reward."""


def reinforce_pp(rewards: Tensor, *, group_size: int) -> Tensor:
    """Rewards standardised over all rows of the batch.

    Value: ``(R_i - mean R) / (std R + BATCH_STD_EPS)`` over the batch, n - 1 in the variance's denominator; 0 where all
        rewards are equal.
    Gradient: times the score of the sequence, grad E[R] over the batch's standard deviation, but for the share of about
        1/B that a row has in its own mean and deviation. All prompts share one factor, so the direction is kept; a
        beta beside it weighs nats against standard deviations of the batch, a unit that changes while training. The
        paper takes the KL into the reward before it standardises; here the KL keeps its weight and stays out.

    Args:
        rewards: ``[B]``.
        group_size: rows per prompt; one is enough.

    Returns:
        ``[B]`` advantages, in standard deviations.

    Raises:
        ValueError: fewer than two rows, or rows that do not fill groups.

    Source: Hu et al. 2025, "REINFORCE++", arXiv 2501.03262.
    """
    flat = grouped(rewards, group_size=group_size, at_least=1).reshape(1, -1)
    if flat.shape[1] < 2:
        raise ValueError("a batch of one group of one row has no deviation: reinforce_pp needs at least 2 rows")
    return standardised(flat, eps=BATCH_STD_EPS).view(-1)


def reinforce_pp_baseline(rewards: Tensor, *, group_size: int) -> Tensor:
    """Rewards less their group's mean, then standardised over the batch.

    Value: ``A_i = R_i - mean_j R_j`` within the group, then ``(A_i - mean A) / (std A + BATCH_STD_EPS)`` over the
        batch; the mean is 0 already.
    Gradient: times the score of the sequence, (1 - 1/G) grad E[R] over the batch's standard deviation, but for the
        share of about 1/B that a row has in it.

    Args:
        rewards: ``[B]``, siblings of one prompt next to each other.
        group_size: rows per prompt, G.

    Returns:
        ``[B]`` advantages, in standard deviations.

    Raises:
        ValueError: fewer than two rows per prompt, or rows that do not fill groups.

    Source: Hu et al. 2025, "REINFORCE++" (with baseline), arXiv 2501.03262.
    """
    groups = grouped(rewards, group_size=group_size)
    centred = (groups - groups.mean(-1, keepdim=True)).masked_fill(
        groups.amax(-1, keepdim=True) == groups.amin(-1, keepdim=True), 0.0
    )
    return standardised(centred.view(1, -1), eps=BATCH_STD_EPS).view(-1)
