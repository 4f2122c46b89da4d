"""Batches prepared while the network computes.

One background thread works through the index batches in order and stays a few batches ahead. What comes out is what the caller's own
loop would have made; only the time differs. Not covered: several preparing threads (decoding has its own pool) or processes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from torch import Tensor

from clipq_ray import logs
from clipq_ray.data.split import Split

Batch = tuple[Tensor, Tensor]
Feed = Callable[..., Iterator[Batch]]
"""Whatever makes batches as `batches` does."""
_POLL_SECONDS = 0.1


def batches(
    split: Split,
    index_batches: Iterable[Tensor],
    generators: Callable[[int], torch.Generator | None],
    prefetch: int = 2,
) -> Iterator[Batch]:
    """`split.batch(indices, generators(number))` for each of `index_batches` (int64 (B,)), in order, `number` counting from 0.

    `prefetch` batches lie ready at most; 0 prepares each when it is asked for, as do splits that must not run in another thread.
    An exception comes out where its batch would have come; closing the iterator (or dropping it) ends the thread.
    """
    made = one_by_one(split, index_batches, generators)
    return ahead(made, prefetch) if prefetch > 0 and split.threaded else made


def one_by_one(
    split: Split, index_batches: Iterable[Tensor], generators: Callable[[int], torch.Generator | None]
) -> Generator[Batch, None, None]:
    """As `batches`, each made when it is asked for."""
    for number, indices in enumerate(index_batches):
        yield split.batch(indices, generators(number))


def ahead(made: Generator[Batch, None, None], prefetch: int) -> Generator[Batch, None, None]:
    """What `made` gives, made by a thread that stays up to `prefetch` batches ahead and closes it at the end."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=prefetch)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_POLL_SECONDS)
                return

    def work() -> None:
        try:
            for batch in made:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # it is the caller's to handle, whatever it is
            put(error)
        finally:
            made.close()

    thread = threading.Thread(target=logs.carried(work), name="clipq-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
