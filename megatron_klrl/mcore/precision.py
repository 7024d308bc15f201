"""8-bit products in Megatron-Core's and Transformer Engine's words."""

from dataclasses import dataclass
from typing import Any

from megatron_klrl.config.precision import alignment
from megatron_klrl.config.recipe import Fp8

_AMAX_HISTORY = 1024
"""Passes whose largest number delayed scaling looks back to; what Transformer Engine's own recipe takes."""

_E4M3 = (Fp8.BLOCKWISE, Fp8.MXFP8)
"""With a scale for each block, gradients too fit into the format with more digits; else they take the wider one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """How the layers multiply.

    Attributes:
        fp8: scaling of 8-bit numbers; none takes the numbers as they are.
        first_last_bf16: the first and the last layer do in any case.
        primary_weights: what is multiplied in 8 bits is kept in 8 bits alone; the optimizer has the exact weights.
    """

    fp8: Fp8 = Fp8.NONE
    first_last_bf16: bool = False
    primary_weights: bool = False

    @property
    def token_multiple(self) -> int:
        """What the tokens that a layer multiplies at once must be a multiple of."""
        return alignment(self.fp8)

    def flags(self) -> dict[str, Any]:
        """Of Megatron's TransformerConfig."""
        if self.fp8 is Fp8.NONE:
            return {}
        found: dict[str, Any] = {
            "fp8": "e4m3" if self.fp8 in _E4M3 else "hybrid",
            "fp8_recipe": self.fp8.value,
            "fp8_param": self.primary_weights,
            "first_last_layers_bf16": self.first_last_bf16,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        }
        if self.fp8 is Fp8.DELAYED:
            found |= {"fp8_amax_history_len": _AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
        return found
