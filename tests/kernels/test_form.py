"""Forms that stand for tensors whose values are not needed."""

import pytest
import torch

from nrm_plugin.kernels.form import Form


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_form_has_the_shape_of_the_tensor_and_the_dtype_of_its_relevance(dtype):
    tensor = torch.rand(2, 3, 4).to(dtype)
    form = Form(tensor)
    assert form.shape == form.tensor.shape == tensor.shape
    assert form.dtype == form.tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert form.tensor.device == tensor.device


def test_forms_hold_no_values_of_the_tensor():
    form = Form(torch.full((1000, 1000), 7.0, requires_grad=True))
    assert form.tensor.untyped_storage().nbytes() == 4
    assert not form.tensor.requires_grad
    assert not form.tensor.is_inference()


def test_forms_of_inference_tensors_may_take_part_in_autograd():
    with torch.inference_mode():
        form = Form(torch.ones(2))
    assert not form.tensor.is_inference()
