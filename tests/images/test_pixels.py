from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from srl_utils.images.pixels import (
    check_images,
    from_pil,
    parse_pixel_distance,
    to_model_range,
    to_model_units,
    to_pil,
    to_unit_range,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 16 / 255 ", 16 / 255), ("0.0314", 0.0314), ("1e-2", 0.01), ("0", 0.0), ("1", 1.0)],
)
def test_distance_is_read_as_number_or_fraction(text: str, value: float) -> None:
    """Oracle: closed form, Python's own float; exact, since a Fraction rounds once."""
    assert parse_pixel_distance(text) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("abc", "not a number"),
        ("", "not a number"),
        ("8/0", "not a number"),
        ("nan", "not a number"),
        ("8/255/2", "not a number"),
        ("8", "outside"),
        ("-1/255", "outside"),
        ("256/255", "outside"),
    ],
)
def test_distance_that_is_none_is_refused(text: str, complaint: str) -> None:
    """Oracle: specification, distances between [0,1] images lie in [0,1]."""
    with pytest.raises(ValueError, match=complaint):
        parse_pixel_distance(text)


def test_distance_doubles_in_model_units() -> None:
    """Oracle: closed form, [-1,1] is twice as long as [0,1]; the same as converting both ends of the distance."""
    distance = torch.tensor(8 / 255)
    ends = to_model_range(distance) - to_model_range(torch.tensor(0.0))
    assert to_model_units(8 / 255) == 16 / 255
    # Two float32 roundings near 1.
    assert ends.item() == pytest.approx(16 / 255, abs=2e-7)


def test_ranges_map_onto_each_other() -> None:
    """Oracle: closed form at the ends and the middle, all exact in binary."""
    model = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    unit = torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert torch.equal(to_unit_range(model), unit)
    assert torch.equal(to_model_range(unit), model)


def test_picture_survives_the_round_trip() -> None:
    """Oracle: invariance, every byte value in every channel and place comes back."""
    pixels = np.random.default_rng(0).permutation(np.arange(3 * 256, dtype=np.int64) % 256)
    picture = pixels.astype(np.uint8).reshape(16, 16, 3)
    tensor = from_pil(Image.fromarray(picture))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert np.array_equal(np.asarray(to_pil(tensor)), picture)


def test_picture_axes_and_ends() -> None:
    """Oracle: closed form, a red pixel at the right of two is 1 in channel 0, column 1 and -1 elsewhere."""
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 0, 0))
    expected = torch.full((3, 1, 2), -1.0)
    expected[0, 0, 1] = 1.0
    assert torch.equal(from_pil(picture), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_beyond_the_range_are_clipped_into_the_picture(dtype: torch.dtype) -> None:
    """Oracle: closed form, -3 is black and 3 is white, also where a tensor still hangs on a graph."""
    tensor = torch.stack([torch.full((2, 2), value) for value in (-3.0, 3.0, -1.0)]).to(dtype).requires_grad_(True)
    assert to_pil(tensor).getpixel((1, 1)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("batch", "complaint"),
    [
        (torch.zeros(3, 8, 8), r"\[N,3,H,W\]"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), 255.0), r"255\.000"),
        (torch.full((1, 3, 8, 8), -1.1), r"-1\.100"),
        (torch.zeros(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
    ],
)
def test_what_is_no_image_batch_is_refused(batch: torch.Tensor, complaint: str) -> None:
    """Oracle: specification; the message names what was found."""
    with pytest.raises(ValueError, match=complaint):
        check_images(batch)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.0 + 2**-8])
def test_image_batch_is_accepted(value: float) -> None:
    """Oracle: specification, the range with the rounding of bfloat16 at its border (2^-8 above 1)."""
    check_images(torch.full((2, 3, 4, 6), value))
