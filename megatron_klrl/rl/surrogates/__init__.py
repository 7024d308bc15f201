"""Policy-gradient surrogates: per-token terms to be maximised, a pure function each.

Every ratio is the current policy over ``old_logprobs``, the trainer's own recompute before the update. The KL passes
through none of them.
"""

from megatron_klrl.rl.surrogates.cispo import cispo
from megatron_klrl.rl.surrogates.gspo import gspo
from megatron_klrl.rl.surrogates.ppo_clip import ppo_clip
from megatron_klrl.rl.surrogates.reinforce import reinforce
from megatron_klrl.rl.surrogates.terms import Separable, Surrogate, SurrogateTerms

__all__ = [
    "REINFORCE",
    "SURROGATES",
    "Separable",
    "Surrogate",
    "SurrogateTerms",
    "cispo",
    "gspo",
    "ppo_clip",
    "reinforce",
]

REINFORCE = Surrogate(terms=reinforce, separable=Separable.TOKENS)
"""Without bounds to fill in."""

SURROGATES: dict[str, Surrogate] = {
    "reinforce": REINFORCE,
    "ppo_clip": Surrogate(terms=ppo_clip, separable=Separable.TOKENS),
    "gspo": Surrogate(terms=gspo, separable=Separable.SEQUENCES),
    "cispo": Surrogate(terms=cispo, separable=Separable.TOKENS),
}
"""By recipe name; the bounds are keyword arguments still to be filled in."""
