"""The training loop on two ranks: what must be equal there is, or the job ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import PLAN, Killed, Network, Small, TwoHeads, kept, network, run, schedule, trainer
from torch import Tensor, nn

from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import RunError
from clipq_ray.finetune import Trainer
from clipq_ray.operator import make_plan
from clipq_ray.ranks import Patience, Rank
from clipq_ray.rates import Held


def as_rank(rank: int, ranks: int, folder: str, work: Callable[..., None], given: tuple[object, ...]) -> None:
    """`work(rank, folder, *given)` as one of so many gloo ranks, which ends without Python's own end.

    A thread of gloo's may still let go of the last collective's tensors then, which needs the interpreter: where it comes too late, the process is aborted.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    work(rank, folder, *given)
    torch.distributed.destroy_process_group()
    os._exit(0)


def on_ranks(ranks: int, folder: Path, work: Callable[..., None], *given: object) -> None:
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(as_rank, (ranks, str(folder), work, given), nprocs=ranks)


def on_two_ranks(folder: Path, work: Callable[..., None], *given: object) -> None:
    on_ranks(2, folder, work, *given)


def busy(rank: int, folder: str) -> None:
    """Rank 0 is busy alone for longer than a collective operation may take."""
    short = torch.distributed.new_group(timeout=timedelta(seconds=1))
    patience = Patience(Rank(rank, 2, torch.device("cpu")))
    if rank == 0:
        time.sleep(3)
    patience.wait()
    (Path(folder) / f"waited-{rank}").touch()
    if rank == 0:
        time.sleep(3)
        return
    with pytest.raises(RuntimeError):
        torch.distributed.barrier(group=short)
    (Path(folder) / "gave-up").touch()


@pytest.mark.slow
def test_ranks_wait_for_one_that_scores_alone_longer_than_for_each_other(tmp_path: Path) -> None:
    on_two_ranks(tmp_path, busy)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "meet") == [
        "gave-up",
        "waited-0",
        "waited-1",
    ]


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


class Residual(Network):
    """Its gradients do not come in the opposite order of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv2d(1, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images))) + self.short(images)
        out: Tensor = self.head(self.drop(nn.functional.max_pool2d(x, 2).flatten(1)))
        return out


def one_of_three(rank: int, folder: str, killed_after: int | None) -> None:
    def made() -> Trainer:
        model = network(Residual)
        return trainer(
            Path(folder) / "c", model, make_plan(model, PLAN), schedule=schedule(batch_size=30), rank=Rank(rank, 3, torch.device("cpu"))
        )  # fmt: skip

    if killed_after:
        with pytest.raises(Killed):
            run(made(), killed_after=killed_after)
        torch.distributed.barrier()  # the first has left its checkpoint
    last = made()
    run(last)
    torch.save(last.model.state_dict(), Path(folder) / f"rank-{rank}")


@pytest.mark.slow
def test_on_three_ranks_too_a_training_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    for killed_after in (None, 1):
        on_ranks(3, tmp_path / str(killed_after), one_of_three, killed_after)
    for rank in range(3):
        whole, cut = (torch.load(tmp_path / str(one) / f"rank-{rank}") for one in (None, 1))
        assert all(torch.equal(value, cut[name]) for name, value in whole.items())
