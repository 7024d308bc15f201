"""Advantages, policy-gradient surrogates and loss aggregation: pure functions on tensors."""
