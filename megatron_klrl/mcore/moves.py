"""Changing the weights other than by the optimizer: by noise, or along a gradient. Alike in every layout."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.mcore import layout
from megatron_klrl.mcore.conversion import fill, local_parameters
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.runtime import seeds

_LOW_HALF = 1 << 16


@torch.no_grad()
def rewrite(
    chunks: Sequence[GPTModel], weights: Iterator[tuple[str, Tensor]], *, shape: ModelShape, groups: ProcessGroups
) -> None:
    """Fill this rank's parameters from a stream of full tensors.

    Args:
        chunks: this rank's part.
        weights: Hugging Face names and full tensors in the order of the model's plan; the same on every rank.
            It may stream this very model: a parameter is overwritten after all its tensors have been taken.
        shape: of the whole model.
        groups: the layout.

    Raises:
        ValueError: the stream has other tensors than the model.
    """
    targets: defaultdict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in local_parameters(chunks, groups=groups):
        # the last stage of a tied model holds a copy of the embedding under the head's name
        targets[layout.EMBEDDING if name == layout.HEAD and shape.tied else name].append(parameter)
    for source in layout.parameters(shape):
        found = list(islice(weights, len(source.hf)))
        if tuple(name for name, _ in found) != source.hf:
            raise ValueError(f"expected {source.hf}, the stream has {[name for name, _ in found]}")
        for target in targets[source.name]:
            fill(target, source, dict(found), shape=shape, groups=groups)
    if (left := next(weights, None)) is not None:
        raise ValueError(f"the model has no tensor {left[0]}")


def with_noise(name: str, weight: Tensor, *, scale: float, seed: int) -> Tensor:
    """A tensor plus Gaussian noise of ``scale`` times its root mean square; depends on nothing but the arguments.

    Args:
        name: of the tensor; part of the seed, so that neither layout nor order matters.
        weight: the full tensor.
        scale: standard deviation of the noise, relative to the tensor's root mean square.
        seed: of the whole perturbation.
    """
    generator = _generator(weight, seed, "noise", name)
    exact = weight.float()
    noise = torch.randn(exact.shape, generator=generator, device=exact.device)
    return _rounded(exact + scale * exact.square().mean().sqrt() * noise, like=weight, generator=generator)


def against(name: str, weight: Tensor, gradient: Tensor, *, eta: float) -> Tensor:
    """``weight - eta * gradient``. In bf16 it is rounded up or down at random, so that it holds on average.

    Nearest rounding would undo most of a small step: bf16 weights lie 0.4 % apart.
    """
    generator = _generator(weight, 0, "step", name)
    return _rounded(weight.float() - eta * gradient, like=weight, generator=generator)


def _generator(weight: Tensor, seed: int, *names: str) -> torch.Generator:
    return torch.Generator(weight.device).manual_seed(seeds.derive(seed, *names))


def _rounded(exact: Tensor, *, like: Tensor, generator: torch.Generator) -> Tensor:
    """To the dtype of ``like``: float32 stays, bf16 is rounded stochastically."""
    if like.dtype == torch.float32:
        return exact
    if like.dtype != torch.bfloat16:
        raise ValueError(f"weights are float32 or bfloat16, not {like.dtype}")
    # bf16 is the upper half of float32: a random lower half carries into it with the right probability
    noise = torch.randint(0, _LOW_HALF, exact.shape, generator=generator, device=exact.device, dtype=torch.int32)
    bits = (exact.contiguous().view(torch.int32) + noise) & -_LOW_HALF
    return bits.view(torch.float32).to(torch.bfloat16)
