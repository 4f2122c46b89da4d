"""The CLIP-Q operator on one tensor: clip, partition, quantize (`reference` has the definition).

Not covered: which layers it is applied to and the gradient through it (`network`), and how (p, b) is found (`search`).
"""

from clipq_ray.quantizer.reference import Quantized, decide_share, quantize, thresholds

__all__ = ["Quantized", "decide_share", "quantize", "thresholds"]
