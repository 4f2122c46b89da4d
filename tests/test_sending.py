"""What is sent to a device arrives there as it was, also where the sender goes on and changes its own."""

from __future__ import annotations

import pytest
import torch

from clipq_ray.sending import sent

DEVICES = [
    torch.device("cpu"),
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_a_tensor_arrives_with_its_values_and_dtype(device: torch.device, dtype: torch.dtype) -> None:
    given = torch.tensor([[0, 1], [1, 0]], dtype=dtype)
    arrived = sent(given, device)
    assert (arrived.device.type, arrived.dtype) == (device.type, dtype)
    assert torch.equal(arrived.cpu(), given)


@pytest.mark.parametrize("device", DEVICES)
def test_what_lies_there_already_stays_where_it_is(device: torch.device) -> None:
    given = torch.arange(3, device=device)
    assert sent(given, device).data_ptr() == given.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_source_that_is_gone_or_changed_does_not_reach_a_copy_under_way() -> None:
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    for number in range(50):
        busy = busy @ busy * 1e-3  # the device has something to do before it comes to the copy
        given = torch.full((128,), number)
        arrived = sent(given, device)
        given.fill_(-1)
        del given
        assert torch.equal(arrived.cpu(), torch.full((128,), number))
