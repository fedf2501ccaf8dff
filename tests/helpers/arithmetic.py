# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What official networks are made of, spelled with elementary operations in float64, by the official names."""

import math

import torch
import torch.nn.functional as F


class Arithmetic:
    """Layers of an official state dict, whose prefix "model." is left out.

    Resampling is a matrix: it halves an axis with the filter's taps, and its transpose, twice as strong, doubles it.
    """

    def __init__(self, weights: dict[str, torch.Tensor], taps: tuple[float, ...] = (1, 1)):
        self.w = {name.removeprefix("model."): tensor.double() for name, tensor in weights.items()}
        self.taps = torch.tensor(taps).double() / sum(taps)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def conv(self, name, x, pad=0):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2 + pad)

    def norm(self, name, x, groups, eps):
        rows = x.reshape(len(x), groups, -1)
        rows = rows - rows.mean(-1, keepdim=True)
        x = (rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
        return x * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def halving(self, size, pad):
        """The matrix that halves an axis of `size`, which is filled up with `pad` zeros at both ends."""
        rows = torch.zeros((size + 2 * pad - len(self.taps)) // 2 + 1, size + 2 * pad, dtype=torch.float64)
        for i, row in enumerate(rows):
            row[2 * i : 2 * i + len(self.taps)] = self.taps
        return rows[:, pad : pad + size]

    def half(self, x):
        matrix = self.halving(x.shape[-1], len(self.taps) // 2 - 1)
        return matrix @ x @ matrix.T

    def double(self, x):
        matrix = 2 * self.halving(2 * x.shape[-1], len(self.taps) // 2 - 1).T
        return matrix @ x @ matrix.T

    def attended(self, query, key, value):
        """Each of shape (B, heads, channels of a head, positions); the result has all channels in one axis."""
        weights = torch.einsum("bhdi,bhdj->bhij", query, key).div(math.sqrt(query.shape[2])).softmax(-1)
        return torch.einsum("bhij,bhdj->bhdi", weights, value).flatten(1, 2)
