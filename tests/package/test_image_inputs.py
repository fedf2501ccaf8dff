# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images in every form that people have them in are the same image; what is no image is refused."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ctm.image_inputs import read_images


PIXELS = torch.randint(256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_is_the_same_image(channels, dtype):
    pixels = PIXELS[:, :channels]
    floats, arrays = pixels.double() / 255, pixels.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array[..., 0] if channels == 1 else array) for array in arrays]
    forms = [pil, tuple(pil), pixels, arrays, list(pixels), list(arrays), [pil[0], arrays[1]], [pixels[:1], floats[1]]]
    forms += [floats, arrays / 255, list(floats), list(arrays / 255), arrays[:, ::-1][:, ::-1], pil[:1] + [floats[1:]]]
    if channels == 1:
        forms += [list(pixels[:, 0]), list(floats[:, 0]), list(arrays[..., 0])]
    for form in forms:
        images = read_images(form, channels, (4, 5), dtype=dtype)
        assert images.dtype == dtype
        torch.testing.assert_close(images, floats.to(dtype), rtol=0, atol=1e-7 if dtype == torch.float32 else 0)
    for form in (pil[0], pixels[0], pixels[:1], arrays[0], [arrays[0]]):
        assert torch.equal(read_images(form, channels, None), read_images(pixels, channels, None)[:1])
    half = read_images(floats.half(), channels, None, dtype=dtype)
    assert half.dtype == dtype and (half - floats).abs().max() < 1e-3


def test_an_array_stays_as_it_is():
    array = np.zeros((4, 4, 3), dtype=np.float32)
    read_images(array, 3, None).fill_(1.0)
    assert (array == 0).all()


@pytest.mark.parametrize(
    "given, message",
    [
        (
            Image.new("L", (4, 4)),
            r"photo has mode 'L'; this network makes images of mode 'RGB'. Pass `image.convert\('RGB'\)",
        ),
        (Image.new("RGBA", (4, 4)), "mode 'RGBA'"),
        (Image.new("P", (4, 4)), "mode 'P'"),
        (Image.new("RGB", (5, 4)), r"photo is 4x5 pixels \(height x width\); this network makes 4x4"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (2, 2))], "2x2 pixels"),
        (torch.full((1, 3, 4, 4), math.nan), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf), "NaN or infinite"),
        (torch.full((3, 4, 4), -1.0), r"values from -1 to -1; floats must lie in \[0, 1\]. Pass \(x \+ 1\) / 2"),
        (torch.full((3, 4, 4), 255.0), "0..255 as uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "photo holds torch.int64; pass floats in"),
        (np.zeros((4, 4, 3), dtype=bool), "photo holds torch.bool"),
        (torch.zeros(1, 1, 4, 4), "photo has 1 channels; this network makes images with 3"),
        (np.zeros((3, 4, 4)), "photo has 4 channels"),
        (torch.zeros(1, 1, 3, 4, 4), "must have shape"),
        (np.zeros(4), "must have shape"),
        (torch.zeros(0, 3, 4, 4), "photo is empty"),
        ([], "photo is an empty list"),
        ("photo.png", "got str"),
        (None, "got NoneType"),
    ],
)
def test_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        read_images(given, 3, (4, 4), "photo")


def test_of_any_size_and_range():
    with pytest.raises(ValueError, match="photo holds images of different sizes"):
        read_images([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], 3, None, "photo")
    with pytest.raises(ValueError, match="no PIL image has 2 channels"):
        read_images(Image.new("L", (4, 4)), 2, None)
    with pytest.raises(ValueError, match="NaN"):
        read_images(torch.full((3, 4, 4), math.nan), 3, None, bounded=False)
    outside = torch.full((1, 3, 4, 4), -0.5)
    assert torch.equal(read_images(outside, 3, None, bounded=False), outside)
