"""Joint matrices by one weight gradient compared with a masked pass for each channel.

Covers: nrm_plugin.measure.groups, nrm_plugin.measure.masked_vectors.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import JointNRM, Normalized, RelevanceMeasure, at, top_walks
from nrm_plugin.errors import EventError
from tests.conftest import LINEAR, composite, slow_but


def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    return net.double().eval()


X = torch.randn(2, 3, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NEIGHBOURS = [("9", "8"), ("10", "9"), ("10", "8"), ("6", "3"), ("5", "2"), ("5", "4"), ("2", "0"), ("3", "input")]
FAR = [("10", "5"), ("8", "6"), ("5", "0"), ("6", "1"), ("10", "input")]


def masked(mu, upper, lower):
    """For each channel of the upper tap, the joint map of the lower tap summed by channel."""
    size = mu.marginal(upper, over="channel").shape[1]
    maps = [mu.marginal(lower, over="channel", joint=at(upper).channel(k)) for k in range(size)]
    return torch.stack(maps, 1)


@pytest.mark.medium
@pytest.mark.parametrize("residual", slow_but(["sink", "redistribute"], "redistribute"))
@pytest.mark.parametrize("name", slow_but(LINEAR, "lrp_0", "epsilon_plus_flat", "epsilon_gamma_box"))
def test_joint_matrices_are_those_of_masked_passes(name, residual):
    mu = RelevanceMeasure(
        build(), X, 1, composite=Normalized(composite(name, []), residual=residual, uncovered="gradient")
    )
    for upper, lower in [*NEIGHBOURS, *FAR]:
        expected = masked(mu, upper, lower)
        scale = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(mu.joint(upper, lower) / scale, expected / scale, rtol=0, atol=1e-10)


def test_joints_of_all_neighbours_equal_the_joint_of_each_pair():
    mu = RelevanceMeasure(build(), X, 1)
    layers = ["10", "8", "5", "2", "0"]
    together = mu.joints(layers)
    assert len(together) == 4
    for matrix, upper, lower in zip(together, layers[:-1], layers[1:], strict=True):
        torch.testing.assert_close(matrix, mu.joint(upper, lower))


def test_neighbours_cost_one_pass_together():
    mu = RelevanceMeasure(build(), X, 1)
    mu.marginal(["input"])
    one_pass = mu.cost.steps
    mu.joints(["5", "2", "0"])
    # The linear layer and the operations between each two of them, once more.
    assert mu.cost.steps <= 2 * one_pass
    mu.joint("5", "0")
    assert mu.cost.vectors > 4


def test_pooling_between_two_layers_costs_no_pass_for_each_channel():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    mu = RelevanceMeasure(net.double().eval(), torch.randn(2, 3, 14, 14).double(), 1)
    mu.marginal(["input"])
    one_pass = mu.cost.vectors
    together = mu.joints(["6", "3", "0"])
    assert mu.cost.vectors <= 2 * one_pass
    for matrix, (upper, lower) in zip(together, [("6", "3"), ("3", "0")], strict=True):
        torch.testing.assert_close(matrix, masked(mu, upper, lower), rtol=0, atol=1e-12)


class Skip(nn.Module):
    """A skip connection over the second of three convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        first = torch.relu(self.first(x))
        return self.third(torch.relu(self.second(first) + first)).mean((2, 3))


def test_a_skip_is_not_treated_as_one_layer():
    torch.manual_seed(0)
    net = Skip().double().eval()
    mu = RelevanceMeasure(net, X, 1)
    for upper, lower in [("third", "first"), ("third", "second"), ("second", "first")]:
        torch.testing.assert_close(mu.joint(upper, lower), masked(mu, upper, lower), rtol=0, atol=1e-12)


def test_layers_in_the_wrong_order_raise():
    mu = RelevanceMeasure(build(), X, 1)
    with pytest.raises(EventError, match="'5' is not below '2'; list layers from the output to the input"):
        mu.joints(["8", "2", "5"])


def test_the_error_for_a_wrong_order_names_the_layers_in_the_right_order():
    net = build()
    mu = RelevanceMeasure(net, X, 1)
    order = r"'5' is not below '2'; .* From the output to the input, '5' comes before '2'"
    for ask in (
        lambda: mu.joint(net[2], net[5]),
        lambda: JointNRM(net, net[2], net[5]).attribute(X, 1),
        lambda: top_walks(RelevanceMeasure(net, X[:1], 1), [net[2], net[5]], 1),
    ):
        with pytest.raises(EventError, match=order):
            ask()
    with pytest.raises(EventError, match=r"'2' is not below '2'; .* They are the same tensor"):
        mu.joint("2", net[2])
    with pytest.raises(EventError, match=r"'2' is not below at\('2', side='input'\); .* comes before"):
        mu.joint(at("2", side="input"), "2")


class Branches(nn.Module):
    """Two parallel layers."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return (self.left(x) + self.right(x)).mean((2, 3))


def test_the_error_for_parallel_layers_says_that_no_walk_crosses_both():
    mu = RelevanceMeasure(Branches().double().eval(), X, 1)
    with pytest.raises(EventError, match=r"'right' is not below 'left'; .* No walk crosses both"):
        mu.joint("left", "right")


def test_tokens_have_their_features_last():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Flatten(), nn.Linear(18, 2)).double().eval()
    mu = RelevanceMeasure(net, torch.randn(2, 6, 4).double(), 1)
    torch.testing.assert_close(mu.joint("2", "0"), masked(mu, "2", "0"), rtol=0, atol=1e-12)


def grouped(mu, upper, lower, rows, columns):
    """For each group of the upper tap, the joint map of the lower tap summed by its groups."""
    maps = [mu.marginal(lower, joint=at(upper)[rows == group]) for group in range(int(rows.max()) + 1)]
    inside = [columns == group for group in range(int(columns.max()) + 1)]
    return torch.stack([torch.stack([(part * mask).flatten(1).sum(1) for mask in inside], 1) for part in maps], 1)


@pytest.mark.parametrize(("upper", "lower"), [("5", "2"), ("5", "0"), ("2", "0"), ("8", "input")])
def test_joint_matrices_of_any_groups(upper, lower):
    mu = RelevanceMeasure(build(), X, 1)
    draw = torch.Generator().manual_seed(0)
    for counts in ((3, 5), (5, 3)):  # passes are for the tap with fewer groups, down or up
        rows, columns = (
            torch.randint(count, mu.shape(name)[1:], generator=draw)
            for count, name in zip(counts, (upper, lower), strict=True)
        )
        rows.view(-1)[0], columns.view(-1)[0] = counts[0] - 1, counts[1] - 1
        joint = mu.joint(upper, lower, over=(rows, columns))
        torch.testing.assert_close(joint, grouped(mu, upper, lower, rows, columns), rtol=0, atol=1e-12)


def test_joint_matrices_of_positions():
    mu = RelevanceMeasure(build(), X, 1)
    matrix = mu.joint("5", "2", over="position")
    heights, widths = mu.shape("5")[2:], mu.shape("2")[2:]
    assert matrix.shape == (2, heights.numel(), widths.numel())
    row = mu.marginal("2", over="position", joint=at("5")[:, 1, 0]).flatten(1)
    torch.testing.assert_close(matrix[:, 1 * heights[1]], row, rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.joint("5", "2", over=("channel", "position")).sum(1), matrix.sum(1))
    labels = torch.arange(widths.numel()).reshape(1, *widths)  # broadcasts over channels
    torch.testing.assert_close(mu.marginal("2", over=labels), mu.marginal("2", over="position").flatten(1))


@pytest.mark.parametrize(
    "labels", [torch.zeros(3), torch.tensor([True]), torch.zeros(7, dtype=int), -torch.ones(1).int()]
)
def test_labels_that_do_not_fit_raise(labels):
    mu = RelevanceMeasure(build(), X, 1)
    with pytest.raises(EventError, match="label"):
        mu.joint("5", "2", over=labels)
