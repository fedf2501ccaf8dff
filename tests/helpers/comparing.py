# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tensors that are equal but for rounding, and seeds."""

import functools

import torch


def close(actual, expected, rtol=1e-5, atol=1e-5):
    """Fail unless two tensors, or a tensor and a number, are equal to float32's precision."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


close_in_float64 = functools.partial(close, rtol=1e-12, atol=1e-12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
