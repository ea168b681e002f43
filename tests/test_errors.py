"""Exception types and the texts that several messages share."""

from __future__ import annotations

import pytest

from nrm_plugin.errors import (
    CancellationError,
    EventError,
    GradModeError,
    InputError,
    MissingExtraError,
    ModelStateError,
    NRMError,
    NullEventError,
    TargetError,
    UncoveredLayerError,
    UnknownLayerError,
    UnsupportedOperationError,
    UnsupportedRuleError,
    extra,
    samples,
    unknown_layer,
)


def test_all_errors_share_one_base_class():
    errors = [CancellationError, EventError, GradModeError, InputError, ModelStateError, NullEventError, TargetError]
    errors += [UncoveredLayerError, UnknownLayerError, UnsupportedOperationError, UnsupportedRuleError]
    assert all(issubclass(error, NRMError) for error in errors)
    assert not issubclass(NullEventError, CancellationError)
    assert not issubclass(CancellationError, NullEventError)


def test_an_unknown_layer_is_reported_with_similar_names_first():
    layers = [f"features.{number}" for number in range(20)]
    assert "Similar names: 'features.9', 'features." in unknown_layer("features.99", layers)
    assert "Some of its taps: 'features.0', 'features.1'" in unknown_layer("zzz", layers)
    assert str(UnknownLayerError("two\nlines")) == "two\nlines"


def test_samples_are_listed_up_to_ten():
    assert samples([False, True]) == "sample 1"
    assert samples([True] * 12) == "samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"


def test_a_missing_dependency_is_reported_with_its_extra():
    with pytest.raises(MissingExtraError, match=r"no_such_package: pip install 'nrm-plugin\[graph\]'"):
        extra("no_such_package.module", "graph")
