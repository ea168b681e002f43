"""Dictionaries against their formulas, one position and one feature at a time."""

from __future__ import annotations

import math

import pytest
import torch

from nrm_plugin import Crosscoder, Dictionary
from nrm_plugin.errors import InputError
from tests.feature_nets import random_dictionary


@pytest.mark.parametrize(("threshold", "k"), [(0.0, None), (0.4, None), (-math.inf, 2), (0.0, 3), ("each", None)])
def test_features_are_those_of_the_formula(threshold, k):
    base = random_dictionary(4, 7, 3)
    limits = torch.linspace(-1, 1, 7).double() if threshold == "each" else threshold
    one = Dictionary(base.encoder, base.decoder, base.encoder_bias, base.decoder_bias, limits, k)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    f, rebuilt = one.encode(x), one.reconstruct(x)
    for n in range(2):
        for t in range(3):
            pre = [float(x[n, t] @ base.encoder[:, j] + base.encoder_bias[j]) for j in range(7)]
            kept = sorted(range(7), key=lambda j: -pre[j])[: k or 7]
            for j in range(7):
                limit = float(limits[j]) if threshold == "each" else threshold
                expected = pre[j] if j in kept and pre[j] > limit else 0.0
                assert float(f[n, t, j]) == pytest.approx(expected)
            total = sum(f[n, t, j] * base.decoder[j] for j in range(7)) + base.decoder_bias
            torch.testing.assert_close(rebuilt[n, t], total)
    torch.testing.assert_close(one.error(x), x - rebuilt)


def test_a_transcoder_reconstructs_another_tensor():
    skip = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    one = Dictionary(torch.zeros(3, 2), torch.zeros(2, 5), skip=skip, reads="input")
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(one.error(x, y), y - x @ skip.T)
    assert (len(one), one.width) == (2, 5)


def test_invalid_dictionaries_raise():
    eye = torch.eye(3)
    with pytest.raises(InputError, match=r"encoder \(d_in, F\) and a decoder \(F, d_out\)"):
        Dictionary(eye, torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"encoder_bias of this dictionary must have shape \(3,\)"):
        Dictionary(eye, eye, torch.zeros(2))
    with pytest.raises(InputError, match="threshold="):
        Dictionary(eye, eye, threshold=torch.zeros(2))
    with pytest.raises(InputError, match="k=4: give 1 to 3"):
        Dictionary(eye, eye, k=4)
    with pytest.raises(InputError, match="reads='both' is unknown"):
        Dictionary(eye, eye, reads="both")
    with pytest.raises(InputError, match="is a transcoder"):
        Dictionary(eye, torch.zeros(3, 2))
    with pytest.raises(InputError, match="decoder of this dictionary is not finite"):
        Dictionary(eye, eye / 0)
    one = Dictionary(eye, eye)
    with pytest.raises(InputError, match="two different layers"):
        Crosscoder({"a": one}, {("a", "b"): eye})
    with pytest.raises(InputError, match=r"must have shape \(3, 3\), got \(2, 3\)"):
        Crosscoder({"a": one, "b": one}, {("a", "b"): torch.zeros(2, 3)})
