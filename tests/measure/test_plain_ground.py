"""Images with and without a plain background."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrm_plugin.errors import InputError
from nrm_plugin.measure.plain_ground import plain_ground

SIDE = 48
ROWS, COLUMNS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")


def disc(row: float = 23.5, column: float = 23.5, radius: float = 14) -> torch.Tensor:
    return (ROWS - row) ** 2 + (COLUMNS - column) ** 2 < radius**2


def drawn(ground: torch.Tensor, mask: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A textured object in front of a ground, ``(3, SIDE, SIDE)``."""
    texture = 0.15 + 0.7 * torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return torch.where(mask, texture, ground)


def of(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).float().reshape(3, 1, 1).expand(3, SIDE, SIDE).clone()


WHITE, BLACK, CREAM = of(1, 1, 1), of(0, 0, 0), of(0.96, 0.94, 0.9)
PHOTO = drawn(WHITE, torch.ones(SIDE, SIDE) > 0)
SHADES = torch.linspace(0.2, 0.8, SIDE).expand(3, SIDE, SIDE)
NOISE = 0.012 * torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
TROUSERS = (COLUMNS > 12) & (COLUMNS < 36) & ~((ROWS > 16) & (COLUMNS > 21) & (COLUMNS < 27))
PULLOVER = (ROWS > 1) & ((COLUMNS > 9) & (COLUMNS < 38) | (4 + (COLUMNS - 23.5).abs() * 0.8 < ROWS))
PULLOVER &= ~((ROWS > 20) & ((COLUMNS - 23.5).abs() < 18) & ((COLUMNS - 23.5).abs() > 15)) & (ROWS < 46)
TEXT = (ROWS % 6 < 3) & ((COLUMNS * 7 + ROWS // 6 * 5) % 11 < 5) & (COLUMNS > 3) & (COLUMNS < 44) & (ROWS > 3)
TEXT &= 40 + 5 * (COLUMNS < 20) > ROWS
PLAIN = {
    "a digit on black": (drawn(BLACK, disc(radius=16) & ~disc(radius=9)), (0, 0, 0)),
    "ink on white paper": (torch.where(disc(radius=12), BLACK, WHITE), (1, 1, 1)),
    "a product on white": (drawn(WHITE, disc(radius=20)), (1, 1, 1)),
    "a product on cream": (drawn(CREAM, disc(radius=20)), (0.96, 0.94, 0.9)),
    "a noisy ground": (drawn((of(0.5, 0.5, 0.5) + NOISE).clamp(0, 1), disc()), (0.5, 0.5, 0.5)),
    "a cut-out whose transparent pixels became white": (drawn(WHITE, disc(20, 30, 12)), (1, 1, 1)),
    "a page of text": (torch.where(TEXT, BLACK, WHITE), (1, 1, 1)),
    "trousers from edge to edge": (drawn(BLACK, TROUSERS), (0, 0, 0)),
    "a pullover from edge to edge": (drawn(BLACK, PULLOVER), (0, 0, 0)),
    "two objects": (drawn(WHITE, disc(column=10, radius=9) | disc(column=36, radius=10)), (1, 1, 1)),
    "a moon in the night": (torch.where(disc(10, 10, 6), WHITE, BLACK), (0, 0, 0)),
    "a portrait cut at the bottom": (drawn(CREAM, disc(16, 23.5, 9) | disc(46, 23.5, 18)), (0.96, 0.94, 0.9)),
}
OTHERS = {
    "a photograph": PHOTO,
    "a gradient": SHADES,
    "a sky above land": drawn(WHITE, (24 + 4 * torch.sin(COLUMNS / 5) < ROWS)),
    "bars above and below": drawn(BLACK, (ROWS > 9) & (ROWS < 38)),
    "bars at the sides": drawn(WHITE, (COLUMNS > 9) & (COLUMNS < 38)),
    "a frame": drawn(WHITE, (ROWS > 5) & (ROWS < 40) & (COLUMNS > 5) & (COLUMNS < 42)),
    "padding in grey": drawn(of(0.485, 0.456, 0.406), (ROWS > 11) & (ROWS < 36)),
    "nothing at all": BLACK,
    "an object that fills the image": drawn(WHITE, disc(radius=31)),
    "an object on a shaded ground": torch.where(disc(), PHOTO, SHADES),
    "an object on a landscape": torch.where(disc(), of(1, 1, 1), PHOTO),
    "a letter on stripes": torch.where(disc(radius=5), PHOTO, torch.where(COLUMNS % 2 > 0, WHITE, BLACK) * 0.9),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_colour_of_a_plain_ground_is_found(name):
    image, colour = PLAIN[name]
    found = plain_ground(image)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(colour).float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_other_images_have_no_plain_ground(name):
    assert plain_ground(OTHERS[name]) is None


EVERY = {name: image for name, (image, _) in PLAIN.items()} | OTHERS


@pytest.mark.parametrize("name", EVERY)
def test_turned_mirrored_and_enlarged_images_have_the_same_ground(name):
    image = EVERY[name]
    expected = plain_ground(image)
    turned = [image.flip(1), image.flip(2), image.transpose(1, 2)]
    larger = image.repeat_interleave(3, 1).repeat_interleave(3, 2)
    for other in (*turned, larger):
        found = plain_ground(other)
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.floats(0, 1, width=32)] * 3),
    st.floats(5, 20),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.integers(0, 99),
)
def test_a_disc_on_any_colour_has_that_ground_and_its_negative_the_negative(colour, radius, down, right, seed):
    image = drawn(of(*colour), disc(23.5 + down, 23.5 + right, radius), seed)
    for one, expected in ((image, torch.tensor(colour)), (1 - image, 1 - torch.tensor(colour))):
        found = plain_ground(one)
        assert found is not None
        torch.testing.assert_close(found, expected.float(), atol=0.001, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31))
def test_a_photograph_between_bars_of_any_width_has_no_ground(channels, above, below, seed):
    image = torch.rand(channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    image[:, :above], image[:, SIDE - below :] = 0, 0
    assert plain_ground(image) is None
    assert plain_ground(image.transpose(1, 2)) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_the_ground_is_a_colour_of_the_border_and_covers_what_is_promised(seed, channels):
    """The conditions, counted pixel by pixel, hold for every ground that is found."""
    draw = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(1, channels, 6, 6, generator=draw) > 0.4).float()
    image = torch.nn.functional.interpolate(coarse, (24, 24))[0]
    found = plain_ground(image)
    if found is None:
        return
    near = [
        [max(abs(float(image[c, r, k] - found[c])) for c in range(channels)) < 0.04 for k in range(24)]
        for r in range(24)
    ]
    columns = [list(column) for column in zip(*near, strict=True)]
    sides = [near[0], near[-1], columns[0], columns[-1]]
    assert sum(map(sum, near)) >= 24 * 24 / 4
    assert sum(map(sum, sides)) >= 4 * 24 / 3
    assert all(sum(side) >= math.ceil(2.4) for side in sides)


@pytest.mark.parametrize("image", [torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8) * 2, torch.full((3, 8, 8), math.nan)])
def test_images_must_be_in_the_unit_range(image):
    with pytest.raises(InputError, match="expected an image"):
        plain_ground(image)
