# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Linear operators as the matrices that they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ctm import BlockAverageOperator, GrayscaleOperator, LinearOperator, MaskOperator
from diffusers_ctm.linear_operators import (
    check_measured_values,
    check_operator,
    consistent_image,
    nearest_image_in_range,
)
from helpers.exact import randn


SHAPE = (3, 4, 6)
KNOWN = (randn(1, 1, 4, 6, seed=5) > 0).float()
OPERATORS = {
    "mask": MaskOperator(KNOWN),
    "gray": GrayscaleOperator(),
    "mean of channels": GrayscaleOperator([1 / 3, 1 / 3, 1 / 3]),
    "blocks": BlockAverageOperator(2),
    "one block each": BlockAverageOperator(1),
}


def matrices(operator):
    """A and A+ as matrices, float64."""
    images = torch.eye(72, dtype=torch.float64).reshape(72, *SHAPE)
    measured = operator(images)
    y = torch.eye(measured[0].numel(), dtype=torch.float64).reshape(-1, *measured.shape[1:])
    return measured.flatten(1).T, operator.pseudo_inverse(y).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_pseudo_inverse_is_that_of_moore_and_penrose(name):
    a, inverse = matrices(OPERATORS[name])
    torch.testing.assert_close(inverse, torch.linalg.pinv(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ inverse @ a, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_consistent_image_is_the_nearest_that_matches(name):
    operator, x, other = OPERATORS[name], randn(2, *SHAPE), randn(2, *SHAPE, seed=1)
    y = operator(other)
    image = consistent_image(operator, operator.pseudo_inverse, x, operator.pseudo_inverse(y))
    torch.testing.assert_close(operator(image), y)
    a, _ = matrices(operator)
    null_space = torch.eye(72, dtype=a.dtype) - torch.linalg.pinv(a) @ a
    torch.testing.assert_close((image - x).flatten(1) @ null_space, torch.zeros(2, 72).double())  # nothing else moved


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_the_image_in_range_is_the_nearest(name, spread):
    """It is clip(x + A^T l), here with each l by bisection: no two rows of these A share a pixel."""
    operator, given = OPERATORS[name], randn(8, *SHAPE).clamp(-1, 1)
    given[0], given[1] = 1.0, -1.0
    x, y = given + spread * randn(8, *SHAPE, seed=1), operator(given)
    image, error = nearest_image_in_range(operator, operator.pseudo_inverse, x, y)
    assert error < 2e-6 and image.abs().max() <= 1
    torch.testing.assert_close(operator(image), y, rtol=0, atol=2e-6)
    a, _ = matrices(operator)
    high = torch.full((8, len(a)), 1e3, dtype=torch.float64)
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        below = (x.flatten(1) + middle @ a).clamp(-1, 1) @ a.T < y.flatten(1)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    nearest = (x.flatten(1) + middle @ a).clamp(-1, 1)
    torch.testing.assert_close(image.flatten(1), nearest, rtol=0, atol=1e-4)


def test_an_image_that_is_in_range_and_matches_stays():
    x = randn(2, *SHAPE).clamp(-1, 1)
    for operator in OPERATORS.values():
        image, error = nearest_image_in_range(operator, operator.pseudo_inverse, x, operator(x))
        assert torch.equal(image, x) and error == 0


class Neighbors:
    """A x: the sum of 4x4 pixels, and `side` times another pixel of the row."""

    def __init__(self, side):
        self.side = side

    def __call__(self, x):
        return sum(x.roll((i, j), (-2, -1)) for i in range(4) for j in range(4)) + self.side * x.roll(8, -1)


@pytest.mark.parametrize("side", [-0.02, 0.4])
def test_values_are_bounded_where_no_weight_is_negative(side):
    operator, shape = Neighbors(side), (2, 3, 16, 16)
    white, y = operator(torch.ones(shape)), operator(torch.zeros(shape))
    for value in (-0.01, float(white.max()) + 0.01):
        y[0, 0, 3, 4] = value
        if side < 0:
            check_measured_values(operator, y, white, shape)
        else:
            with pytest.raises(ValueError, match="measurement has values from .* from 0 to 16.4 for pixels in"):
                check_measured_values(operator, y, white, shape)
    check_measured_values(operator, white, white, shape)


def test_a_mask_keeps_pixels_bit_for_bit():
    x, other = 80 * randn(2, *SHAPE, dtype=torch.float32), randn(2, *SHAPE, seed=1, dtype=torch.float32)
    operator = OPERATORS["mask"]
    image = consistent_image(operator, operator.pseudo_inverse, x, operator(other))
    assert torch.equal(image, torch.where(KNOWN == 1, other, x))


def test_colorization_is_a_change_of_basis():
    # Song et al. 2023, Algorithm 4: x <- Q [(Q^T y) in the first coordinate, (Q^T x) in the others]
    weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.stack([weights, *randn(2, 3)]).T)
    x, other = randn(2, *SHAPE), randn(2, *SHAPE, seed=1)
    turned = torch.einsum("ck,bchw->bkhw", basis, x)
    turned[:, 0] = torch.einsum("c,bchw->bhw", basis[:, 0], other)
    expected = torch.einsum("ck,bkhw->bchw", basis, turned)
    operator = GrayscaleOperator(weights)
    image = consistent_image(operator, operator.pseudo_inverse, x, operator.pseudo_inverse(operator(other)))
    torch.testing.assert_close(image, expected)


def test_gray_is_that_of_pil():
    pixels = (randn(8, 9, 3).clamp(-2, 2) * 60 + 127).to(torch.uint8)
    gray = np.array(Image.fromarray(pixels.numpy()).convert("L"))
    ours = GrayscaleOperator()(pixels.double().permute(2, 0, 1)[None])[0, 0]
    assert (ours - torch.from_numpy(gray).double()).abs().max() <= 1  # PIL cuts fractions off
    white = torch.ones(1, 3, 2, 2)
    torch.testing.assert_close(GrayscaleOperator()(white), torch.ones(1, 1, 2, 2))


def test_blocks_are_averaged_each():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert BlockAverageOperator(2)(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert BlockAverageOperator(2).pseudo_inverse(torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1, 1, 2, 2]] * 2]]


def test_an_operator_of_ones_own():
    class Shear(LinearOperator):
        def __call__(self, x):
            return x[..., 0] + 2 * x[..., 1]

        def pseudo_inverse(self, y):
            return torch.stack([y / 5, 2 * y / 5], dim=-1)

    operator, y = Shear(), randn(3, 1, 4)
    check_operator(operator, operator.pseudo_inverse, (3, 1, 4, 2), y)
    for name in ("__call__", "pseudo_inverse"):
        with pytest.raises(NotImplementedError):
            getattr(LinearOperator(), name)(y)


def halves(x):
    return x[..., :3]


def fill(y):
    return torch.cat([y, torch.zeros_like(y)], dim=-1)


@pytest.mark.parametrize(
    "operator, pseudo_inverse, message",
    [
        (lambda x: halves(x).clamp(-1, 1), fill, "operator is not linear"),
        (lambda x: halves(x) + 1, fill, "operator is not linear"),
        (lambda x: (halves(x) * 255).round() / 255, fill, "operator is not linear"),
        (lambda x: halves(x) * (1 + 0.01 * x.square().mean()), fill, "operator is not linear"),
        (halves, lambda y: fill(y) + 0.1, r"pseudo_inverse is not linear"),
        (halves, lambda y: 2 * fill(y), "pseudo_inverse does not belong to the operator"),
        (halves, lambda y: fill(y).flip(-1), "pseudo_inverse does not belong to the operator"),
        (halves, lambda y: y, r"pseudo_inverse gives \(2, 3, 4, 3\)"),
        (halves, lambda y: None, "pseudo_inverse gives NoneType"),
        (lambda x: x, lambda y: y, r"measurement has shape \(2, 3, 4, 3\), but the operator gives \(2, 3, 4, 6\)"),
        (lambda x: halves(x)[:1], fill, r"but the operator gives \(1, 3, 4, 3\)"),
        (lambda x: 3.0, fill, "but the operator gives float"),
        (lambda x: halves(x) * float("nan"), fill, "operator is not linear"),
        (
            BlockAverageOperator(4),
            fill,
            r"operator fails for images of shape \(2, 3, 4, 6\): ValueError: factor=4 does not",
        ),
        (
            halves,
            lambda y: y @ torch.eye(2),
            r"pseudo_inverse fails for a measurement of shape \(2, 3, 4, 3\): RuntimeError",
        ),
    ],
)
def test_what_is_no_operator(operator, pseudo_inverse, message):
    with pytest.raises(ValueError, match=message):
        check_operator(operator, pseudo_inverse, (2, *SHAPE), torch.zeros(2, 3, 4, 3))


def test_what_is_one_passes():
    check_operator(halves, fill, (2, *SHAPE), torch.zeros(2, 3, 4, 3))
    check_operator(lambda x: 0 * x, lambda y: 0 * y, (2, *SHAPE), torch.zeros(2, *SHAPE))
    for operator in OPERATORS.values():
        check_operator(operator, operator.pseudo_inverse, (2, *SHAPE), operator(torch.zeros(2, *SHAPE)))


def test_arguments_of_operators():
    with pytest.raises(ValueError, match="0 and 1 only"):
        MaskOperator(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="sum 1"):
        GrayscaleOperator([0.5, 0.6, 0.7])
    with pytest.raises(ValueError, match="3 weights for images of 1 channels"):
        GrayscaleOperator()(torch.zeros(1, 1, 2, 2))
    for factor in (0, 2.0):
        with pytest.raises(ValueError, match="factor must be a whole number >= 1"):
            BlockAverageOperator(factor)
    with pytest.raises(ValueError, match="factor=4 does not divide images of 4x6"):
        BlockAverageOperator(4)(torch.zeros(1, *SHAPE))
