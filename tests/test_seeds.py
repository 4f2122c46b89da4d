"""Seeds are functions of a place in the run, never of history."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import torch

from clipq_ray import seeds


def test_the_same_place_has_the_same_seed_whatever_was_drawn_before() -> None:
    first = seeds.derive(7, "finetune", 3, 11, 0)
    torch.rand(10)
    random.random()
    torch.manual_seed(123)
    assert seeds.derive(7, "finetune", 3, 11, 0) == first


def test_a_seed_is_the_same_in_another_process() -> None:
    code = "from clipq_ray import seeds; print(seeds.derive(7, 'finetune', 3, 11, 0))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) == seeds.derive(7, "finetune", 3, 11, 0)


def test_every_place_has_its_own_seed() -> None:
    places = itertools.product((0, 1), ("finetune", "search"), range(12), range(12), range(3))
    drawn = [seeds.derive(run, stage, epoch, step, rank) for run, stage, epoch, step, rank in places]
    assert len(set(drawn)) == len(drawn)


def test_neighbouring_numbers_are_not_run_together() -> None:
    assert seeds.derive(1, "a", 1, 11) != seeds.derive(1, "a", 11, 1) != seeds.derive(11, "a", 1, 1)


def test_a_seed_has_63_bits_and_torch_takes_it() -> None:
    drawn = [seeds.derive(0, "x", i) for i in range(500)]
    assert all(0 <= value < 2**63 for value in drawn)
    assert max(drawn) > 2**62


def test_a_generator_draws_the_same_at_its_place_and_leaves_the_global_one() -> None:
    before = torch.get_rng_state()
    first = torch.rand(5, generator=seeds.generator(3, "batch norm", 2))
    assert torch.equal(first, torch.rand(5, generator=seeds.generator(3, "batch norm", 2)))
    assert not torch.equal(first, torch.rand(5, generator=seeds.generator(3, "batch norm", 3)))
    assert torch.equal(before, torch.get_rng_state())


def test_code_of_others_draws_the_same_at_the_same_place_and_nothing_else_does() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def inside() -> tuple[float, float, float]:
        with seeds.everywhere(7, "finetune", 3):
            return draws()

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    np.random.seed(1)
    first = inside()
    assert first == inside()
    # what waits at random between tries of a store is not to wait in step with other workers
    assert draws()[:2] == expected[:2]
    with seeds.everywhere(7, "finetune", 4):
        assert draws() != first


def test_all_states_are_afterwards_as_before() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeds.everywhere(7, "finetune", 3):
        inside = torch.rand(4)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    # what is drawn inside is what torch draws from this seed by itself
    torch.manual_seed(seeds.derive(7, "finetune", 3))
    assert torch.equal(inside, torch.rand(4))
