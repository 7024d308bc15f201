"""Log-probabilities, entropy and full-vocabulary KL from logits that are cut over the vocabulary."""
