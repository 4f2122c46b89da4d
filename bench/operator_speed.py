"""`make bench-operator`: the operator against a copy of the same weights, and training steps with it against plain ones.

The unit is `torch._foreach_copy_` of the weights into kept tensors, in the same process, measured between the operator's passes. Weights move a
little before every pass, as in training. Steps are measured in interleaved pairs on random images; the share of the operator in a step is the
median of paired differences over the median plain step, with a bootstrapped 95 % interval. `--quick` for a look.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import Row, row, write
from clipq_ray import models
from clipq_ray.operator import Operator, make_plan
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer import decide_share, reference, requantizer

THETAS = {"p0.6 b2": Theta(0.6, 2), "p0.8 b4": Theta(0.8, 4), "p0.3 b8": Theta(0.3, 8)}
HEADLINE = "p0.8 b4"


def seconds(work: Callable[..., object], *arguments: Any) -> float:
    """Wall time of one call; on a GPU, until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def operator_rows(name: str, repeats: int, device: str, goal: float) -> list[Row]:
    """Copy, reference and fast operator over all conv and linear weights of a torchvision network."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).to(device)
    weights = [parameter.detach() for parameter in network.parameters() if parameter.dim() > 1]
    values = [torch.empty_like(weight) for weight in weights]
    drift = [1e-5 * torch.randn_like(weight) for weight in weights]
    rows = []
    for label, theta in THETAS.items():
        layers = [(theta, decide_share(weight, theta)) for weight in weights]
        fast = requantizer(layers, weights)
        torch._foreach_copy_(values, weights)
        fast.run(weights, values)
        copies, passes, ratios = [], [], []
        for _ in range(repeats):
            torch._foreach_add_(weights, drift)
            copies.append(seconds(torch._foreach_copy_, values, weights))
            passes.append(seconds(fast.run, weights, values))
            ratios.append(passes[-1] / copies[-1])
        place = f"operator/{device}/{name}/{label.replace(' ', '-')}"
        rows += [
            row(f"{place}/copy", [1e3 * t for t in copies], "ms"),
            row(f"{place}/fast", [1e3 * t for t in passes], "ms"),
            row(f"{place}/over_copy", ratios, "copies", goal=goal),
        ]
        if label == HEADLINE:
            plain = [seconds(_reference, weights, layers) for _ in range(3)]
            rows.append(row(f"{place}/reference", [1e3 * t for t in plain], "ms"))
    return rows


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    operator: Operator | None,
) -> None:
    """One step of SGD."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        output = model(images)
    nn.functional.cross_entropy(output.float(), labels).backward()
    if operator is None:
        optimizer.step()
    else:
        with operator.full_precision():
            optimizer.step()


def _reference(weights: list[Tensor], layers: list[tuple[Theta, Share]]) -> None:
    for weight, (theta, share) in zip(weights, layers, strict=True):
        reference.quantize(weight, theta, share)


def step_rows(
    name: str, shape: tuple[int, int, int], batch: int, pairs: int, goal: float, device: str
) -> list[Row]:
    """A training step plainly and with the operator, alternating; with bfloat16 autocast on a GPU."""
    images, labels = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    sides = []
    for with_operator in (False, True):
        torch.manual_seed(0)
        model = models.build(models.architecture(name, 10, {})).to(device)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        theta = {n: THETAS[HEADLINE] for n, p in model.named_parameters() if p.dim() > 1}
        operator = Operator(model, make_plan(model, theta)) if with_operator else None
        sides.append((model.train(), optimizer, operator))
        step(*sides[-1][:2], images, labels, operator)
    plain, differences = [], []
    for pair in range(pairs):
        times = [0.0, 0.0]
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            model, optimizer, operator = sides[side]
            times[side] = seconds(step, model, optimizer, images, labels, operator)
        plain.append(times[0])
        differences.append(times[1] - times[0])
    share = [100 * difference / statistics.median(plain) for difference in differences]
    low, high = interval(share)
    place = f"operator/{device}/step/{name}-batch{batch}"
    return [
        row(f"{place}/plain", [1e3 * t for t in plain], "ms"),
        row(f"{place}/slower", share, "%", goal=goal),
        Row(f"{place}/slower/interval_low", low, "%", n=pairs),
        Row(f"{place}/slower/interval_high", high, "%", n=pairs),
    ]


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor(values, dtype=torch.float64)
    medians = data[torch.randint(0, len(data), (draws, len(data)), generator=generator)].median(1).values
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; the result is not stored")
    parser.add_argument(
        "--pairs",
        type=int,
        default=30,
        help="pairs of ResNet-50 steps, eleven seconds each on two cores (default: 30)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    quick = given.quick
    torch.set_num_threads(2)
    repeats = 5 if quick else 30
    networks = ("resnet50", "alexnet")
    goal = {"cpu": 8.0, "cuda": 2.5}[given.device]
    rows = [one for name in networks for one in operator_rows(name, repeats, given.device, goal)]
    if given.device == "cpu":
        rows += step_rows("resnet20", (3, 32, 32), 128, 4 if quick else 60, 3.0, "cpu")
        rows += step_rows("resnet50", (3, 224, 224), 32, 2 if quick else given.pairs, 5.0, "cpu")
    else:
        rows += step_rows("resnet50", (3, 224, 224), 256, repeats, 3.0, "cuda")
    if quick:
        from bench.record import table

        print(table(rows))
    else:
        print(f"stored in {write('operator' if given.device == 'cpu' else 'operator_gpu', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
