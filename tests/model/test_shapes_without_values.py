"""Addresses of tensors without values distinguish storages as those of other tensors do."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nrm_plugin.model.shapes_without_values import data_address, is_valueless, storage_address, valueless


@pytest.mark.parametrize("is_fake", [False, True])
def test_views_share_the_address_of_their_storage(is_fake):
    x, y = torch.zeros(4, 5), torch.zeros(4, 5)
    if is_fake:
        mode = FakeTensorMode()
        x, y = mode.from_tensor(x), mode.from_tensor(y)
    assert storage_address(x[1:]) == storage_address(x) != storage_address(y)
    assert data_address(x[1:]) - data_address(x) == 5 * 4
    assert data_address(x.view(20)) == data_address(x)


def test_the_state_ends_with_the_context():
    with valueless():
        assert is_valueless()
    assert not is_valueless()
