"""What every way of moving weights has in common."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from megatron_klrl.weight_sync.plan import Bucket


class Transport(Protocol):
    """Moves buckets between the ranks of a group. Collective: all ranks collect the same buckets in the same order."""

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Every tensor of a bucket, whole, on every rank.

        Args:
            bucket: of the plan.
            parts: this rank's parts of parameters by name, all of one dtype.

        Returns:
            Hugging Face names and tensors. They may be views of memory that the next call but one writes to, or of the
            parts themselves: whoever keeps or changes one makes a copy.
        """
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


def stream(plan: Sequence[Bucket], parts: Mapping[str, Tensor], transport: Transport) -> Iterator[tuple[str, Tensor]]:
    """All tensors, bucket by bucket: never more than two buckets beside the weights themselves.

    Collective; every rank consumes it to its end. What a tensor's memory is good for, ``Transport.collect`` says.
    """
    for bucket in plan:
        yield from transport.collect(bucket, parts)
