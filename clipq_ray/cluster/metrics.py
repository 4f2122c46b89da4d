"""How a job goes, for Prometheus, through Ray's metrics: every node of a cluster serves them at its metrics port.

`ray_clipq_evaluations_total` evaluations of the search, by network; `ray_clipq_images_per_second` of what runs, by network and stage;
`ray_clipq_bytes_saved_total` by the runs that were committed, by network. A node keeps its totals for as long as it is there, also those of jobs and workers
that have ended; a speed goes 20 s after what was so fast. Ray sends them every 10 s and when a process ends, so one that is killed loses at most that.
Not covered: the result, which the manifest has.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

_EVERY_SECONDS = 0.5  # between two looks at a training's speed


class Meter:
    """The metrics of one process; made in it, since Ray binds them to the process."""

    def __init__(self) -> None:
        by_network, by_stage = ("network",), ("network", "stage")
        self._evaluations = Counter(
            "clipq_evaluations", "evaluations of the search that were measured", by_network
        )
        self._speed = Gauge("clipq_images_per_second", "images per second of what runs", by_stage)
        self._saved = Counter(
            "clipq_bytes_saved", "bytes before less bytes of the file, of committed runs", by_network
        )

    def evaluated(self, network: str, images: int, seconds: float) -> None:
        """One evaluation of the search, over so many images."""
        self._evaluations.inc(1.0, {"network": network})
        if seconds > 0:
            self.speed(network, "search", images / seconds)

    def speed(self, network: str, stage: str, images_per_second: float) -> None:
        """How fast a stage is."""
        self._speed.set(images_per_second, {"network": network, "stage": stage})

    def committed(self, network: str, bytes_before: int, bytes_after: int) -> None:
        """A run was committed."""
        if bytes_before > bytes_after:
            self._saved.inc(float(bytes_before - bytes_after), {"network": network})


class TrainingSpeed:
    """Images per second of a training, from its steps; `images`: per step, over all workers."""

    def __init__(self, meter: Meter, network: str, stage: str, images: int) -> None:
        self._meter, self._network, self._stage, self._images = meter, network, stage, images
        self._since: tuple[float, int] | None = None
        self._due = 0.0  # seconds until the next is said; the first at once, since a training may be short

    def step(self, done: int) -> None:
        """So many steps were done."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        elif done > self._since[1] and now - self._since[0] >= self._due and now > self._since[0]:
            before, steps = self._since
            self._due = _EVERY_SECONDS
            self._meter.speed(self._network, self._stage, (done - steps) * self._images / (now - before))
            self._since = (now, done)
