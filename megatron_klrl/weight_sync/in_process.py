"""For ranks that hold all of the model: nothing moves."""

from collections.abc import Mapping

from torch import Tensor

from megatron_klrl.weight_sync.plan import Bucket, Whole


class InProcess:
    """Hands out the parts themselves; only what is stored interleaved (queries, keys, values) is copied."""

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Transport.collect``.

        Raises:
            ValueError: a tensor is spread over several ranks.
        """
        return [(tensor.name, self._whole(tensor, parts)) for tensor in bucket.tensors]

    def close(self) -> None:
        """Nothing is held."""

    def _whole(self, tensor: Whole, parts: Mapping[str, Tensor]) -> Tensor:
        if len(tensor.shares) != 1:
            raise ValueError(f"{tensor.name} is spread over {len(tensor.shares)} ranks: this transport moves nothing")
        (share,) = tensor.shares
        return share.block.of_part(parts[share.part]).reshape(tensor.size)
