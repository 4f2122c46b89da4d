"""`make bench-search`, second part: what the evaluations of a search cost with kept values (`clipq_ray.prefix`) and without.

For every layer, evaluations of the whole network and evaluations on kept values take turns on the same images, decoded in memory on both sides,
with the layer at another theta each time; predictions must be equal. A layer's search of `EVALUATIONS` evaluations costs that many whole ones, or
one that keeps values and the rest on them. "bound" is what the same layers could reach if keeping cost nothing: the ratio of whole evaluations to
what lies behind each layer, which passes 2 where early layers take more than their share. ResNet-20 has the given weights and CIFAR-10's images,
ResNet-50 random weights and random images.

"makespan" is a simulation: layers, the longest first, as the job hands them out, on so many equal workers, each layer taking the time that was
measured here for all its evaluations; in units of the critical path, which is the longest layer. "efficiency" is the work over workers x makespan.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import Row, row, write
from clipq_ray import models
from clipq_ray.data import Preprocessing, Split, open_data
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.plan import Theta
from clipq_ray.prefix import LayerScores
from clipq_ray.quantizer import decide_share, quantize

EVALUATIONS = 18  # per layer, the job's default
THETAS = (Theta(0.6, 2), Theta(0.8, 4), Theta(0.4, 3))
LIMIT = 8 << 30


def _timed(scores: LayerScores, layer: str) -> tuple[float, npt.NDArray[np.int64]]:
    began = time.perf_counter()
    found = scores.evaluate((layer,))
    return time.perf_counter() - began, found.predictions


@torch.no_grad()
def one_layer(model: nn.Module, layer: str, split: Split, batch: int) -> tuple[float, float, float]:
    """Seconds of a whole evaluation, of the first one that keeps values, and of a further one: medians."""
    cpu = torch.device("cpu")
    whole, kept = (LayerScores(model, split, batch, cpu, limit) for limit in (0, LIMIT))
    parameter = model.get_parameter(layer)
    before = parameter.clone()
    first = 0.0
    times: dict[str, list[float]] = {"whole": [], "kept": []}
    for number, theta in enumerate((THETAS[0], *THETAS)):
        parameter.copy_(quantize(before, theta, decide_share(before, theta)).values)
        seconds, expected = _timed(whole, layer)
        mine, found = _timed(kept, layer)
        np.testing.assert_array_equal(found, expected)
        if number == 0:
            first = mine
        else:
            times["whole"].append(seconds)
            times["kept"].append(mine)
        parameter.copy_(before)
    return statistics.median(times["whole"]), first, statistics.median(times["kept"])


def makespan(times: Sequence[float], workers: int) -> float:
    """The end of the last layer where every worker takes the longest one left as soon as it is free."""
    free = [0.0] * workers
    for seconds in sorted(times, reverse=True):
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def simulated(place: str, times: Sequence[float]) -> list[Row]:
    """Makespans for 1 to 256 workers."""
    rows, longest = [], max(times)
    for workers in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        end = makespan(times, workers)
        goal = 0.9 if workers == 16 and "resnet50" in place else None
        rows.append(Row(f"{place}/makespan/{workers}", end / longest, "critical paths"))
        rows.append(
            Row(
                f"{place}/efficiency/{workers}",
                sum(times) / (workers * end),
                "ratio",
                goal=goal,
                better="higher",
            )
        )
    return rows


def network(place: str, model: nn.Module, split: Split, batch: int, repeats: int) -> list[Row]:
    """Rows of one network."""
    layers = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    ratios, bounds, times = [], [], list[list[float]]()
    for _ in range(repeats):
        found = [one_layer(model, layer, split, batch) for layer in layers]
        whole = EVALUATIONS * sum(one for one, _, _ in found)
        times.append([first + (EVALUATIONS - 1) * further for _, first, further in found])
        ratios.append(whole / sum(times[-1]))
        bounds.append(sum(one for one, _, _ in found) / sum(further for _, _, further in found))
    return [
        row(f"{place}/whole_over_kept", ratios, "ratio", goal=1.7, better="higher"),
        row(f"{place}/bound", bounds, "ratio"),
        Row(f"{place}/layers", len(layers), "layers"),
        Row(f"{place}/images", len(split), "images"),
        *simulated(place, [statistics.median(layer) for layer in zip(*times, strict=True)]),
    ]


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/cifar10")
    parser.add_argument(
        "--repeats", type=int, default=1, help="passes over all layers of ResNet-20 (default: %(default)s)"
    )
    parser.add_argument(
        "--resnet50-images",
        type=int,
        default=12,
        help="images that ResNet-50 is measured on (default: %(default)s)",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    resnet20 = models.build(models.architecture("resnet20", 10, {})).eval()
    weights = models.read_weights(
        str(given.shared / "weights" / "resnet20-cifar10.safetensors"),
        models.architecture("resnet20", 10, {}),
    )
    models.apply_weights(resnet20, weights, "given")
    cifar = open_data(str(given.shared / "data" / "cifar10"), input_shape=(3, 32, 32)).train
    rows = network("search/resnet20", resnet20, cifar.subset(torch.arange(200)), 200, given.repeats)
    torch.manual_seed(0)
    resnet50 = models.build(models.architecture("resnet50", 1000, {})).eval()
    random = np.random.default_rng(0)
    count = given.resnet50_images
    pixels = random.integers(0, 256, (count, 3, 224, 224), dtype=np.uint8)
    way = Preprocessing((3, 224, 224), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = TensorSplit(pixels, random.integers(0, 1000, count), way)
    rows += network("search/resnet50-random-weights", resnet50, images, count, 1)
    print(write("search_cost", rows))


if __name__ == "__main__":
    main()
