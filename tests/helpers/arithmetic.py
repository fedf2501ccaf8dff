# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What official networks are made of, spelled with elementary operations in float64, by the official names."""

import math

import torch
import torch.nn.functional as F


class Arithmetic:
    """Layers of an official state dict, whose prefix "model." is left out."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.w = {name.removeprefix("model."): tensor.double() for name, tensor in weights.items()}

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

    def attended(self, query, key, value):
        """Each of shape (B, heads, channels of a head, positions); the result has all channels in one axis."""
        weights = torch.einsum("bhdi,bhdj->bhij", query, key).div(math.sqrt(query.shape[2])).softmax(-1)
        return torch.einsum("bhij,bhdj->bhdi", weights, value).flatten(1, 2)
