# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Linear measurements A of images with their pseudo-inverses A+, and the projection onto the images that match one."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from .checks import check_count


class LinearOperator:
    """A linear map A of a batch of images, each alone, with its pseudo-inverse A+. Subclass it for one of your own.

    `operator(x)` is A x and `operator.pseudo_inverse(y)` is A+ y, an image; A A+ A = A. Where A+ is the Moore-Penrose
    one (A+ A symmetric, as in all classes here), A+ A is an orthogonal projection: what A sees is replaced and nothing
    else.
    """

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A x for images x of shape (B, C, H, W); the result has shape (B, ...)."""
        raise NotImplementedError

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """A+ y, shape (B, C, H, W)."""
        raise NotImplementedError


class MaskOperator(LinearOperator):
    """Inpainting: A x keeps the known pixels and has 0 elsewhere. A+ = A.

    Args:
        known: 1 where a pixel is known and 0 where not, of a shape that broadcasts with the images, e.g. (B, 1, H, W).

    Raises:
        ValueError: for other values than 0 and 1.
    """

    def __init__(self, known: torch.Tensor):
        if not ((known == 0) | (known == 1)).all():
            raise ValueError("known must hold 0 and 1 only, 1 where a pixel is known.")
        self.known = known

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.known.to(device=x.device, dtype=x.dtype)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self(y)


class GrayscaleOperator(LinearOperator):
    """Colorization: A x is the weighted mean over channels, shape (B, 1, H, W); A+ y = w y / |w|^2.

    The same as a change to an orthogonal basis of colors whose first vector is w / |w| and of which the first
    coordinate is known (Song et al. 2023, consistency models, Algorithm 4).

    Args:
        weights: w, one per channel, with sum 1; the default is luma as in PIL's mode "L" (ITU-R 601).

    Raises:
        ValueError: for weights whose sum is not 1.
    """

    def __init__(self, weights: Sequence[float] = (0.299, 0.587, 0.114)):
        self.weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").reshape(1, -1, 1, 1)
        if not abs(float(self.weights.sum()) - 1) < 1e-6:  # else gray in [-1, 1] would not be a measurement
            raise ValueError(f"weights must have the sum 1, got {list(weights)}.")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.weights.shape[1]:
            raise ValueError(
                f"GrayscaleOperator has {self.weights.shape[1]} weights for images of {x.shape[1]} channels."
            )
        return (x * self.weights.to(device=x.device, dtype=x.dtype)).sum(1, keepdim=True)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y * (self.weights / self.weights.square().sum()).to(device=y.device, dtype=y.dtype)


class BlockAverageOperator(LinearOperator):
    """Super-resolution: A x is the mean of each block of `factor` x `factor` pixels; A+ y repeats it over its block.

    Raises:
        ValueError: for a factor that is no whole number >= 1, or images whose height or width it does not divide.
    """

    def __init__(self, factor: int):
        check_count(factor=factor)
        self.factor = int(factor)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"factor={self.factor} does not divide images of {x.shape[-2]}x{x.shape[-1]} pixels.")
        return functional.avg_pool2d(x, self.factor)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)


def consistent_image(
    operator: Callable, pseudo_inverse: Callable, x: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """A+ y + (I - A+ A) x, given `known` = A+ y: the image nearest to x whose measurement is y.

    Written in this order a mask's known pixels are those of `known` bit for bit, and the others those of x.
    """
    return known + (x - pseudo_inverse(operator(x)))


def check_operator(
    operator: Callable, pseudo_inverse: Callable, image_shape: tuple[int, ...], y: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """Check on random images that A is linear, fits `y`, and A A+ A = A; all relative to the largest value.

    Args:
        image_shape: (B, C, H, W).
        y: the measurement, shape (B, ...).

    Raises:
        ValueError: that says which of these does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(image_shape, generator=generator, device="cpu").to(y) for _ in range(2))
    try:
        of_a, of_b = operator(a), operator(b)
    except Exception as error:  # of whatever it is made
        raise ValueError(
            f"operator fails for images of shape {tuple(image_shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(of_a, torch.Tensor) or of_a.shape != y.shape:
        shape = tuple(of_a.shape) if isinstance(of_a, torch.Tensor) else type(of_a).__name__
        raise ValueError(
            f"measurement has shape {tuple(y.shape)}, but the operator gives {shape} for images of shape {image_shape}."
        )
    try:
        back = pseudo_inverse(of_a)
    except Exception as error:
        raise ValueError(
            f"pseudo_inverse fails for a measurement of shape {tuple(of_a.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(back, torch.Tensor) or back.shape != a.shape:
        shape = tuple(back.shape) if isinstance(back, torch.Tensor) else type(back).__name__
        raise ValueError(f"pseudo_inverse gives {shape} for a measurement of an image of shape {image_shape}.")

    combined, expected = 2 * of_a - 3 * of_b, 2 * back - 3 * pseudo_inverse(of_b)
    for one, other, fault in (
        (operator(2 * a - 3 * b), combined, "operator is not linear: A(2a - 3b) is not 2 A(a) - 3 A(b)"),
        (pseudo_inverse(combined), expected, "pseudo_inverse is not linear: A+(2y - 3z) is not 2 A+(y) - 3 A+(z)"),
        (operator(back), of_a, "pseudo_inverse does not belong to the operator: A(A+(A(x))) is not A(x)"),
    ):
        if not (one - other).abs().max() <= tolerance * torch.maximum(one.abs().max(), other.abs().max()):
            raise ValueError(f"{fault} for random images.")
