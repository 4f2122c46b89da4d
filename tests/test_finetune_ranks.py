"""The training loop on two ranks: what must be equal there is, or the job ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import PLAN, Small, TwoHeads, kept, network, run, schedule, trainer

from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import RunError
from clipq_ray.operator import make_plan
from clipq_ray.ranks import Rank
from clipq_ray.rates import Held


def as_rank(rank: int, folder: str, work: Callable[..., None], given: tuple[object, ...]) -> None:
    """`work(rank, folder, *given)` as one of two gloo ranks, which ends without Python's own end.

    A thread of gloo's may still let go of the last collective's tensors then, which needs the interpreter: where it comes too late, the process is aborted.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    work(rank, folder, *given)
    torch.distributed.destroy_process_group()
    os._exit(0)


def on_two_ranks(folder: Path, work: Callable[..., None], *given: object) -> None:
    torch.multiprocessing.spawn(as_rank, (str(folder), work, given), nprocs=2)


def one_of_two(rank: int, folder: str, differing: bool) -> None:
    """With `differing`, rank 1 begins with other weights in the last layer."""
    model = network()
    plan = make_plan(model, PLAN)
    held = Held(180, kept)
    made = trainer(Path(folder) / "c", model, plan, rank=Rank(rank, 2, torch.device("cpu")), held=held)
    if differing and rank:  # after DDP has made the ranks equal
        assert made.operator is not None
        with made.operator.full_precision(), torch.no_grad():
            model.get_parameter("head.weight").mul_(-1)
    result = Path(folder) / f"rank-{rank}"
    try:
        run(made)
        result.write_text("ended")
    except RunError as error:
        result.write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("differing", [False, True], ids=["equal", "differing"])
def test_ranks_with_other_codes_are_found_after_one_epoch(differing: bool, tmp_path: Path) -> None:
    on_two_ranks(tmp_path, one_of_two, differing)
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}").read_text()
        assert (
            ("epoch 1: workers hold different codes in layer head.weight" in said)
            if differing
            else (said == "ended")
        )


def one_of_two_with_two_heads(rank: int, folder: str) -> None:
    model = network(TwoHeads)
    rows = run(
        trainer(Path(folder) / "c", model, make_plan(model, PLAN), rank=Rank(rank, 2, torch.device("cpu")))
    )
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    torch.save((len(rows), parameters), Path(folder) / f"rank-{rank}")


@pytest.mark.slow
def test_a_head_without_a_gradient_holds_up_no_worker(tmp_path: Path) -> None:
    on_two_ranks(tmp_path, one_of_two_with_two_heads)
    first, second = (torch.load(tmp_path / f"rank-{rank}") for rank in range(2))
    assert first[0] == second[0] == 4
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


def one_of_two_unevenly(rank: int, folder: str) -> None:
    made = trainer(
        Path(folder) / "c", schedule=schedule(batch_size=11), rank=Rank(rank, 2, torch.device("cpu"))
    )
    (Path(folder) / f"rank-{rank}").write_text(f"{made.micro_batch} {made.notes}")


@pytest.mark.slow
def test_a_batch_that_is_not_shared_out_evenly_is_no_lack_of_memory(tmp_path: Path) -> None:
    on_two_ranks(tmp_path, one_of_two_unevenly)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["6 []", "5 []"]


def trained_unevenly(folder: Path, rank: Rank) -> tuple[list[torch.Tensor], list[float]]:
    """Parameters and losses of a training on batches of 11, without what ranks draw by themselves."""

    def plain(split: TensorSplit, rows: Sequence[torch.Tensor], *_: Any) -> Iterator[Any]:
        return (split.batch(one, None) for one in rows)

    made = trainer(
        folder, network(Small, 20), schedule=schedule(batch_size=11, cutout_pixels=0), rank=rank, feed=plain
    )
    run(made)
    return [one.detach() for one in made.model.parameters()], [row.loss for row in made.curve]


def one_of_two_on_plain_images(rank: int, folder: str) -> None:
    found = trained_unevenly(Path(folder) / "c", Rank(rank, 2, torch.device("cpu")))
    torch.save(found, Path(folder) / f"rank-{rank}")


@pytest.mark.slow
def test_a_batch_that_is_not_shared_out_evenly_trains_as_on_one_worker(tmp_path: Path) -> None:
    on_two_ranks(tmp_path, one_of_two_on_plain_images)
    alone = trained_unevenly(tmp_path / "alone", Rank(0, 1, torch.device("cpu")))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"rank-{rank}"), alone, rtol=1e-4, atol=1e-5)
