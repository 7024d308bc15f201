"""Imported once by the fork server, so that a test's ranks start in a fraction of a second."""

import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer
import torch
import transformers

__all__ = ["megatron", "torch", "transformers"]
torch.set_num_threads(1)
