"""Reinforcement learning for language models on Megatron-Core and vLLM, with the KL term done right."""

__version__ = "0.1.0"
