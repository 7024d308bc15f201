"""Which block of which tensor comes from which rank's part, in buckets of bounded size. Pure, and made once per run.

Names and sizes on the receiving side are Hugging Face's, because that is what engines load, whatever their own layout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""Start and end along each dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What a rank's part of a parameter shares with one whole tensor.

    Both are looked at in shapes of equal rank, in which the block is a box.

    Attributes:
        name: of the whole tensor.
        view: shape it is looked at in.
        box: the block there.
        part_view: shape that the rank's part is looked at in.
        part_box: the block there.
    """

    name: str
    view: tuple[int, ...]
    box: Box
    part_view: tuple[int, ...]
    part_box: Box

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return prod(end - start for start, end in self.box)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The block as a view of the whole tensor."""
        return _narrowed(tensor.view(self.view), self.box)

    def of_part(self, part: Tensor) -> Tensor:
        """The block as a view of the rank's part."""
        return _narrowed(part.view(self.part_view), self.part_box)


def _narrowed(tensor: Tensor, box: Box) -> Tensor:
    for dimension, (start, end) in enumerate(box):
        tensor = tensor.narrow(dimension, start, end - start)
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A block and where it comes from.

    Attributes:
        holder: number of the rank in the group that exchanges; its part holds the block.
        part: name of the parameter there.
        block: of the whole tensor.
    """

    holder: int
    part: str
    block: Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """One whole tensor.

    Attributes:
        name: Hugging Face's.
        size: its dimensions.
        module: tensors that an engine fuses into one module stay in one bucket: it may hold on to some until it has
            all of them.
        shares: blocks that cover it, each element once.
    """

    name: str
    size: tuple[int, ...]
    module: str
    shares: tuple[Share, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors that travel together, one after the other in flat memory.

    Attributes:
        tensors: in the order of the model.
        starts: first element of each.
    """

    tensors: tuple[Whole, ...]
    starts: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the flat memory."""
        return self.starts[-1] + self.tensors[-1].numel

    @property
    def holders(self) -> tuple[int, ...]:
        """Ranks that something of it comes from, in order."""
        return tuple(sorted({share.holder for tensor in self.tensors for share in tensor.shares}))

    def views(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Every tensor as a view of the flat memory."""
        pairs = zip(self.tensors, self.starts, strict=True)
        return [(tensor.name, flat[start : start + tensor.numel].view(tensor.size)) for tensor, start in pairs]

    def shares_of(self, holder: int) -> list[tuple[int, Share]]:
        """What comes from one rank, with the number of the tensor it belongs to."""
        return [
            (n, share) for n, tensor in enumerate(self.tensors) for share in tensor.shares if share.holder == holder
        ]


def buckets(tensors: Iterable[Whole], *, max_numel: int) -> tuple[Bucket, ...]:
    """Pack tensors, in order, into buckets of at most ``max_numel`` elements.

    A module that is larger by itself gets a bucket of its own.

    Raises:
        ValueError: the shares of a tensor do not cover it.
    """
    found: list[Bucket] = []
    waiting: list[Whole] = []
    for module in _modules(tensors):
        for tensor in module:
            _check_cover(tensor)
        if waiting and sum(t.numel for t in [*waiting, *module]) > max_numel:
            found.append(_bucket(waiting))
            waiting = []
        waiting += module
    return tuple([*found, _bucket(waiting)] if waiting else found)


def _modules(tensors: Iterable[Whole]) -> list[list[Whole]]:
    grouped: list[list[Whole]] = []
    for tensor in tensors:
        if grouped and grouped[-1][0].module == tensor.module:
            grouped[-1].append(tensor)
        else:
            grouped.append([tensor])
    return grouped


def _bucket(tensors: Sequence[Whole]) -> Bucket:
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += tensor.numel
    return Bucket(tensors=tuple(tensors), starts=tuple(starts))


def _check_cover(tensor: Whole) -> None:
    covered = sum(share.block.numel for share in tensor.shares)
    if covered != tensor.numel:
        raise ValueError(f"{tensor.name}: its shares cover {covered} of {tensor.numel} elements")
