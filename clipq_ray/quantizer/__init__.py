"""The CLIP-Q operator: clip, partition, quantize (`reference` has the definition; `fast` and the rest give the same bits sooner).

Not covered: which layers it is applied to and the gradient through it (`operator`), and how (p, b) is found (`search`).
"""

from clipq_ray.quantizer.fast import Requantizer, decide_share, quantize, requantizer, slow_on
from clipq_ray.quantizer.on_cpu import NonFinite
from clipq_ray.quantizer.reference import Quantized, thresholds

__all__ = [
    "NonFinite",
    "Quantized",
    "Requantizer",
    "decide_share",
    "quantize",
    "requantizer",
    "slow_on",
    "thresholds",
]
