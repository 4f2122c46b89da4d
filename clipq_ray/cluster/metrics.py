"""How a job goes, for Prometheus, through Ray's metrics: every node of a cluster serves them at its metrics port.

`ray_clipq_evaluations_total` evaluations of the search, by network; `ray_clipq_images_per_second` of what runs, by network and stage;
`ray_clipq_bytes_saved` of the latest packed file, by network, and `ray_clipq_file_bytes` its size. Not covered: the result, which the manifest has.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

_EVERY_SECONDS = 2.0  # between two looks at a training's speed


class Meter:
    """The metrics of one process; made in it, since Ray binds them to the process."""

    def __init__(self) -> None:
        by_network, by_stage = ("network",), ("network", "stage")
        self._evaluations = Counter(
            "clipq_evaluations", "evaluations of the search that were measured", by_network
        )
        self._speed = Gauge("clipq_images_per_second", "images per second of what runs", by_stage)
        self._saved = Gauge("clipq_bytes_saved", "bytes before less bytes of the latest file", by_network)
        self._file = Gauge("clipq_file_bytes", "bytes of the latest file", by_network)

    def evaluated(self, network: str, images: int, seconds: float) -> None:
        """One evaluation of the search, over so many images."""
        self._evaluations.inc(1.0, {"network": network})
        if seconds > 0:
            self.speed(network, "search", images / seconds)

    def speed(self, network: str, stage: str, images_per_second: float) -> None:
        """How fast a stage is."""
        self._speed.set(images_per_second, {"network": network, "stage": stage})

    def packed(self, network: str, bytes_before: int, bytes_after: int) -> None:
        """A file was packed."""
        self._saved.set(float(bytes_before - bytes_after), {"network": network})
        self._file.set(float(bytes_after), {"network": network})


class TrainingSpeed:
    """Images per second of a training, from its steps; `images`: per step, over all workers."""

    def __init__(self, meter: Meter, network: str, stage: str, images: int) -> None:
        self._meter, self._network, self._stage, self._images = meter, network, stage, images
        self._since: tuple[float, int] | None = None

    def step(self, done: int) -> None:
        """So many steps were done."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        elif now - self._since[0] >= _EVERY_SECONDS:
            before, steps = self._since
            self._meter.speed(self._network, self._stage, (done - steps) * self._images / (now - before))
            self._since = (now, done)
