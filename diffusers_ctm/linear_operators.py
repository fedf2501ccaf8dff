# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Linear measurements A of images with their pseudo-inverses A+, and the projections onto the images that match one."""

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
        if not abs(float(self.weights.sum()) - 1) < 1e-6:  # else white would not be 1
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


def nearest_image_in_range(
    operator: Callable, pseudo_inverse: Callable, x: torch.Tensor, y: torch.Tensor, max_iterations: int = 1000
) -> tuple[torch.Tensor, float]:
    """The image in [-1, 1] nearest to x whose measurement is y, and the largest error of its measurement.

    It is clip(x + A+ l) for the l where A of that is y. l is found by dual ascent, l <- l + y - A clip(x + A+ l), whose
    step 1 is right because A+ A and clip never lengthen a difference; accelerated as a fast dual proximal gradient
    method (Beck & Teboulle 2014), each image restarted where its momentum points against the ascent (O'Donoghue &
    Candes 2015). Means, masks and luminance are matched to 1e-6 in 20 to 200 iterations; an operator that sees far
    across an image with many pixels at the ends of the range may take all of them. Where no image in range has the
    measurement, the nearest that was met is returned.

    Args:
        x: shape (B, C, H, W), of any range.
        y: measurement of an image in [-1, 1], shape (B, ...).

    Returns:
        the images, and max |A x - y| relative to the larger of max |y| and max |A 1|, with 1 the white image.
    """
    scale = torch.maximum(operator(torch.ones_like(x)).abs().max(), y.abs().max())
    dual = moved = torch.zeros_like(x)  # A+ l, in front of and behind the momentum
    momentum = x.new_ones(len(x), *[1] * (x.ndim - 1))
    best, least = x.clamp(-1, 1), torch.full_like(momentum, torch.inf)
    for i in range(max_iterations):
        image = (x + moved).clamp(-1, 1)
        missing = y - operator(image)
        error = missing.abs().flatten(1).amax(1).reshape_as(least)
        best, least = torch.where(error < least, image, best), torch.minimum(error, least)
        if i % 20 == 0 and not (least > 1e-6 * scale).any():  # one wait for the device in 20 iterations
            break
        ascent = pseudo_inverse(missing)
        step = moved + ascent - dual
        restart = (ascent * step).flatten(1).sum(1).reshape_as(least) < 0
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        dual = moved + ascent
        moved = dual + torch.where(restart, 0, (momentum - 1) / following) * step
        momentum = torch.where(restart, 1, following)
    return best, float(least.max() / scale) if scale > 0 else 0.0


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


def check_measured_values(
    operator: Callable, y: torch.Tensor, white: torch.Tensor, image_shape: tuple[int, ...]
) -> None:
    """Check that `y` lies in [0, A(1)] if no weight of A is negative, as what it gives for pixels in [0, 1] does.

    A negative weight is seen in A of few bright pixels on black, at some density of these.

    Args:
        y: the measurement, shape (B, ...).
        white: A(1), of the same shape, for the image of ones.
        image_shape: (B, C, H, W).

    Raises:
        ValueError: that says what to pass.
    """
    generator = torch.Generator().manual_seed(0)
    for one_in in (2, 8, 32, 128, 512, 2048):
        bright = (torch.rand(image_shape, generator=generator, device="cpu") * one_in < 1).to(y)
        of_bright = operator(bright)
        if not of_bright.min() >= -1e-4 * of_bright.abs().max():
            return
    slack = 1e-4 * white.max()
    if not ((y >= -slack) & (y <= white + slack)).all():
        raise ValueError(
            f"measurement has values from {y.min():g} to {y.max():g}, and the operator gives values from 0 to "
            f"{white.max():g} for pixels in [0, 1], nowhere more than for a white image. Pass what it gives for these: "
            "`operator(image)`, or `operator((x + 1) / 2)` of an image x in [-1, 1]; clip a noisy measurement."
        )
