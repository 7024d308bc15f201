"""How much a set of importance weights is worth."""

from torch import Tensor


def effective_share(weights: Tensor) -> float:
    """Effective sample size over the number of weights: ``(sum w)**2 / (n sum w**2)``.

    1 for equal weights, 1/n where a single one counts, 0 where none is left.

    Args:
        weights: ``[n]``, not negative.

    Source: Kish 1965, "Survey Sampling".
    """
    exact = weights.double()
    squares = exact.square().sum() * exact.numel()
    return float(exact.sum().square() / squares) if squares > 0 else 0.0
