"""What the presets share: sentences, the keys that stand for a thing, and sections in short. Imports no torch."""

OTHER_UPDATES = (
    "It makes {} updates per batch; here one by default (loop.updates_per_batch), whose ratio is 1 and never clips."
)
CLAMP = "It clamps the log-ratio at 20 and the estimate at 10, where the gradient ends; here nothing is clamped."
CLAMP_10 = "It clamps the estimate at 10; here nothing is clamped."
TOKEN_OBJECTIVE = "It states objective=token, the KL that this form follows; objective=sequence would refuse it."
TRAINER_RATIO = "Its ratio is to the trainer's own recompute; here to the engine that sampled."
OWN_BETA = "kl.beta is left to the recipe: {}."
COMMON_FACTOR = (
    "Its token mean divides reward and KL alike, a factor of the learning rate, so sequence_sum stands for it."
)

BY_TOKENS = (
    "Its token mean divides KL and reward alike, here it divides the reward only. For its balance divide kl.beta by "
    "the mean response length in tokens; or keep the number and set algorithm.aggregation=sequence_sum, which differs "
    "from its loss by one common factor."
)
BY_LENGTH = (
    "Its mean over the tokens of each response divides the KL, here it does not. For its balance divide kl.beta by the "
    "mean response length in tokens (exact where responses are equally long)."
)

FORM = "kl.placement kl.estimator kl.credit kl.correction"
BETA, ADVANTAGE, AGGREGATION = "kl.beta", "algorithm.advantage", "algorithm.aggregation"
SURROGATE = "algorithm.surrogate"
CLIP = "algorithm.surrogate algorithm.clip_low algorithm.clip_high"


def kl(name: str, *, beta: float | None = None, objective: str = "sequence") -> dict[str, object]:
    placement, estimator, credit, correction = name.split("/")
    settings: dict[str, object] = {
        "objective": objective,
        "estimator": estimator,
        "placement": placement,
        "credit": credit,
        "correction": correction,
    }
    return settings if beta is None else {"beta": beta, **settings}


def algorithm(advantage: str, aggregation: str, **surrogate: object) -> dict[str, object]:
    """Clipped as in PPO. Bounds stand here where they are not the surrogate's own: a user may change the surrogate."""
    return {"advantage": advantage, "surrogate": "ppo_clip", "aggregation": aggregation, **surrogate}


RLOO = algorithm("rloo", "sequence_sum", surrogate="reinforce")
