"""The codec's bench measures what it says: sizes of codes alone that come back, and the entropy that a closed form gives."""

from __future__ import annotations

import numpy as np
import pytest

from bench import codec as bench
from clipq_ray import codec


def layer(codes: list[list[int]]) -> codec.CodedLayer:
    levels = np.array([-0.5, 0.0, 0.25, 0.75], np.float32)
    return codec.CodedLayer(np.array(codes, np.int16), levels, 1)


@pytest.mark.parametrize("coder", bench.OURS, ids=lambda coder: coder.name)
def test_every_coder_gives_codes_back_and_its_bytes_do_not_depend_on_levels(coder: bench.Coder) -> None:
    one = layer([[0, 1, -1, 0, 0, 0, 2, 0]] * 40)
    other = codec.CodedLayer(one.codes, one.levels * 3, one.negative)
    blob = coder.encode(one)
    assert coder.encode(other) == blob  # one_pass compares what comes back
    assert bench.one_pass(coder, [one, other])[0] == 2 * len(blob[1])


def test_the_entropy_is_that_of_the_shares() -> None:
    assert bench.order_0(layer([[0, 0, 0, 0, 1, 1, -1, 2]])) == pytest.approx(8 * 1.75 / 8)


def test_every_name_in_the_table_of_coders_is_there_once() -> None:
    names = [coder.name for coder in bench.OURS]
    assert len(set(names)) == len(names)
    assert "nncodec" not in names
