"""`make bench-codec`, second part: the file around the codes. What is not a layer's codes, and how fast a file becomes a network.

Files: every network that CLIP-Q trained in `bench/records`, and a ResNet-50 with random weights (marked so: its accuracy is nothing, its ratio is
not one to compare) quantized at p 0.7, b 3 and folded as a job does. "Overhead" is the file less the layers' blobs: prefix, header, checksums,
batch norm, biases. Loading is measured in processes of their own: a state dict with everything imported and compiled, the first one on a machine
whose cache of compiled code is empty, and the memory at its highest above what was there before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import ROOT, Row, row, write
from clipq_ray import codec

CHECKSUM = 4
WARM = """
import json, sys, time
from pathlib import Path
import torch
from clipq_ray import load_state_dict
def memory():
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("VmHWM", "VmRSS"))}
path, repeats = sys.argv[1], int(sys.argv[2])
load_state_dict(path, [json.loads(sys.argv[3])])  # imports and compiles
began = memory()["VmRSS"]
Path("/proc/self/clear_refs").write_text("5")
state = load_state_dict(path)
peak = memory()["VmHWM"] - began
size = sum(value.numel() * value.element_size() for value in state.values())
seconds = []
for _ in range(repeats):
    del state
    start = time.perf_counter()
    state = load_state_dict(path)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"peak": peak, "size": size, "seconds": seconds}))
"""
FIRST = """
import sys, time
import torch
start = time.perf_counter()
import clipq_ray
clipq_ray.load_state_dict(sys.argv[1])
print(time.perf_counter() - start)
"""


def resnet50(profile: codec.Profile) -> bytes:
    """A file of ResNet-50's shapes; random weights, batch norms as if trained."""
    import torch

    from clipq_ray import folding, models
    from clipq_ray.plan import Theta
    from clipq_ray.quantizer import decide_share, quantize

    torch.manual_seed(0)
    architecture = models.architecture("resnet50", 1000, {})
    model = models.build(architecture)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                torch.nn.init.normal_(tensor, 1.0 if tensor is norm.weight else 0.0, 0.3)  # type: ignore[arg-type]
            torch.nn.init.uniform_(norm.running_var, 0.2, 2.0)  # type: ignore[arg-type]
    tensors: dict[str, codec.Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            theta = Theta(0.7, 3)
            share = decide_share(weight.detach(), theta)
            tensors[name] = codec.coded(quantize(weight.detach(), theta, share), share).halved()
    kept = [name for name, value in model.state_dict().items() if value.dim() == 1]
    grids, norms = folding.on_grids(model, kept, folding.USUAL)
    metadata = {"architecture": architecture.to_json(), "classes": 1000}
    return codec.encode(codec.Packed(metadata, {**tensors, **grids}, norms), profile)


def sizes(place: str, file: bytes) -> list[Row]:
    """Bytes of the file and of what is in it."""
    entries = codec.entries(file)
    tensors = codec.decode(file).tensors
    layers = [entry for entry in entries if isinstance(tensors.get(entry.name), codec.CodedLayer)]
    coded = sum(entry.bytes - CHECKSUM for entry in layers)
    rest = sum(entry.bytes - CHECKSUM for entry in entries) - coded
    overhead = len(file) - coded
    small = len(file) < 1_000_000
    levels = sum(one.levels.size - 1 for one in tensors.values() if isinstance(one, codec.CodedLayer))
    return [
        Row(f"{place}/bytes", len(file), "bytes"),
        Row(f"{place}/overhead", overhead, "bytes", goal=1500 if "resnet20" in place else None),
        Row(f"{place}/overhead_percent", 100 * overhead / len(file), "%", goal=None if small else 1.0),
        Row(f"{place}/header_and_checksums", overhead - rest, "bytes"),
        Row(f"{place}/batch_norm_and_biases", rest, "bytes"),
        Row(f"{place}/levels", levels, "levels"),
    ]


def run(program: str, *arguments: str, **environment: str) -> Any:
    """What a program prints, as JSON."""
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(ended.stdout)


def loading(place: str, file: bytes, repeats: int) -> list[Row]:
    """Seconds and memory of a state dict from a local file."""
    entries = [entry for entry in codec.entries(file) if not entry.members]
    largest, least = (pick(entries, key=lambda entry: entry.elements) for pick in (max, min))
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.clq"
        path.write_bytes(file)
        warm = run(WARM, str(path), str(repeats), json.dumps(least.name))
        first = []
        for number in range(3):
            first.append(run(FIRST, str(path), NUMBA_CACHE_DIR=str(Path(folder) / f"cache-{number}")))
    above = (warm["peak"] - warm["size"]) / (4 * largest.elements * cores)
    return [
        row(f"{place}/state_dict", warm["seconds"], "s", goal=1.0),
        row(f"{place}/state_dict/first_on_a_machine", first, "s", goal=5.0),
        Row(f"{place}/network", warm["size"], "bytes"),
        Row(f"{place}/peak_memory", warm["peak"], "bytes"),
        Row(f"{place}/peak_above_network_per_core_in_largest_layers", above, "ratio", goal=1.0),
    ]


def main() -> None:
    """All rows."""
    # There are no options, but --help and slips are not to measure for minutes and to replace the committed result.
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    rows: list[Row] = []
    for path in sorted((ROOT / "bench" / "records").glob("*.clq")):
        rows += sizes(f"file/{path.stem}", path.read_bytes())
    profiles: tuple[codec.Profile, ...] = ("fast", "small")
    for profile in profiles:
        place = f"file/resnet50-random-weights/{profile}"
        file = resnet50(profile)
        rows += sizes(place, file)
        if profile == "fast":
            rows += loading(place, file, 20)
    print(write("packed_file", rows))


if __name__ == "__main__":
    main()
