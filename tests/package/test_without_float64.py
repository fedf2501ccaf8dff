# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Nothing asks for float64 on a device that may not have it, as Apple's MPS has not."""

import pytest
import torch

from diffusers_ctm import CTMScheduler, EDMHeunScheduler, slerp
from diffusers_ctm.image_inputs import read_images
from helpers.exact import randn


class WithoutFloat64(torch.Tensor):
    """A tensor on a device without float64: only its copy on the CPU can become one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("This device does not have float64.")
        return result


def on_device(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float32).as_subclass(WithoutFloat64)


def test_what_such_a_device_is():
    x = on_device(2, 3)
    for function in (
        torch.Tensor.double,
        lambda x: x.to(torch.float64),
        lambda x: torch.add(x, torch.ones(3).double()),
    ):
        with pytest.raises(TypeError, match="float64"):
            function(x)
    assert x.cpu().double().dtype == torch.float64


def test_spherical_interpolation():
    a, b = on_device(2, 3, 4, seed=1), on_device(2, 3, 4, seed=2)
    found = slerp(a, b, 0.3)
    assert isinstance(found, WithoutFloat64) and torch.equal(found.cpu(), slerp(a.cpu(), b.cpu(), 0.3))


def test_images_for_a_likelihood():
    image = on_device(1, 3, 4, 4).sigmoid()
    for given in (image, [image[0]]):
        found = read_images(given, 3, (4, 4), dtype=torch.float64)
        assert torch.equal(found, image.cpu().double())


@pytest.mark.parametrize("cls", [CTMScheduler, EDMHeunScheduler])
@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "epsilon", "beta_schedule": "linear", "sigma_min": 0.02, "sigma_max": 100.0}]
)
def test_a_run(cls, config):
    scheduler = cls(**config)
    runs = []
    for x in (on_device(2, 1, 4, 4), on_device(2, 1, 4, 4).cpu()):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x).prev_sample
        runs.append(scheduler.add_noise(x, torch.ones_like(x), scheduler.timesteps[:2]))
    assert isinstance(runs[0], WithoutFloat64) and torch.equal(runs[0].cpu(), runs[1])
