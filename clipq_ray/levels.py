"""Levels fitted to the loss: codes stay as they are, and what they stand for is trained.

CLIP-Q's levels are means of the weights that they stand for, which is what quantizing moves least, not what the loss likes best. `Levels` takes the place of
`operator.Operator` in a training whose codes are fixed: the gradient of a level is the sum of those of its weights, and all weights of a level stay equal; what is
clipped stays zero; all else that a network learns (biases, batch norm) is trained along. A file differs by what its vectors and grids take then.

Source: trained quantization of Han et al., ICLR 2016, section 3. Not covered: the schedule and the optimizer (`finetune`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipq_ray.operator import Recovery, bake
from clipq_ray.plan import Plan
from clipq_ray.quantizer import Quantized


class Levels:
    """The levels of a network's planned parameters, trainable; `model` is changed in place: at once its planned parameters hold quantized weights.

    `ModelError` where the plan names a parameter that the network lacks, or a weight is NaN or infinite."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._layers: list[tuple[str, nn.Parameter, Tensor, list[int]]] = [
            (name, model.get_parameter(name), one.codes, one.codes.unique().tolist())
            for name, one in bake(model, plan).items()
        ]

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        for _, parameter, codes, used in self._layers:
            if parameter.grad is None:
                continue
            given, summed = parameter.grad, torch.zeros_like(parameter.grad)
            # masks and sums, not scattered additions: on a GPU their order would be another on every rank
            for code in used:
                if code:
                    mask = codes == code
                    summed += mask * (given * mask).sum()
            parameter.grad.copy_(summed)

    @torch.no_grad()
    def _tie(self) -> None:
        """Weights of one code are equal up to the rounding of the optimizer's last steps: now they are equal."""
        for _, parameter, codes, used in self._layers:
            for code in used:
                mask = codes == code
                level = parameter.masked_fill(~mask, -torch.inf).max() if code else parameter.new_zeros(())
                parameter.copy_(torch.where(mask, level, parameter))

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, each weight's gradient is its level's; what was changed there is the same for all weights of a level on leaving."""
        self._sum_gradients()
        yield
        self._tie()

    @contextmanager
    def reading_full_precision(self) -> Iterator[None]:
        """Nothing but the quantized weights is there."""
        yield

    def requantize(self) -> None:
        """Nothing: codes are fixed."""

    def check(self) -> None:
        """Nothing: a loss that is not finite says what there is to say."""

    def code_hashes(self) -> dict[str, int]:
        """A CRC-32 of every layer's quantized weights: equal where ranks hold the same."""
        return {
            name: zlib.crc32(parameter.detach().cpu().contiguous().numpy().tobytes())
            for name, parameter, _, _ in self._layers
        }

    def recovery(self) -> dict[str, Recovery]:
        """Nothing: no weight is clipped anew."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing: codes follow from the first weights, levels from those of the checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`."""

    def detach(self) -> None:
        """Leave the quantized weights in the parameters."""
        self._layers = []


@torch.no_grad()
def fitted(
    quantized: Mapping[str, Quantized], weights: Mapping[str, Tensor], plan: Plan
) -> dict[str, Quantized]:
    """`quantized`, by `plan`, with the levels that its codes have in `weights` (those that a training with `Levels` left); a level that has passed zero or another
    one stands where that one does, since a file's levels are in order."""
    return {
        layer.layer: _with_levels(quantized[layer.layer], weights[layer.layer], layer.share.negative)
        for layer in plan.layers
    }


def _with_levels(one: Quantized, weight: Tensor, negative: int) -> Quantized:
    levels = one.levels.clone()
    for code in one.codes.unique().tolist():
        levels[code + negative] = weight.to(levels.device)[one.codes == code].max() if code else 0.0
    # nan (an empty interval) orders nothing
    magnitudes = torch.stack((levels, -levels)).nan_to_num(nan=0.0).clamp(min=0)
    above, below = (
        magnitudes[0, negative + 1 :].cummax(0).values,
        magnitudes[1, :negative].flip(0).cummax(0).values,
    )
    found = torch.cat((-below.flip(0), levels.new_zeros(1), above))
    levels = torch.where(levels.isnan(), levels, found)
    values = levels.nan_to_num(nan=0.0)[one.codes.long() + negative].to(one.values.dtype)
    return replace(one, levels=levels, values=torch.empty_like(one.values).copy_(values))
