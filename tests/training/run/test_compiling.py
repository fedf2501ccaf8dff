# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A compiled network is the same network, whatever the batch; its last layer can be differentiated alone."""

import copy

import torch
from torch._dynamo.utils import counters

from training.run.compiling import compile_network


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.last_layer = torch.nn.Linear(4, 2)

    def forward(self, x, scale=None):
        x = self.body(x).tanh()
        return self.last_layer(x if scale is None else x * scale[:, None])


def test_a_compiled_network():
    network = Network()
    names, plain = list(network.state_dict()), Network()
    plain.load_state_dict(network.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compile_network(network, "aot_eager")
    assert list(network.state_dict()) == names
    graphs = []
    for batch in (5, 3, 7, 4, 16):
        x, scale = torch.randn(batch, 4), torch.rand(batch)
        ours, theirs = network(x, scale=scale), plain(x, scale=scale)
        torch.testing.assert_close(ours, theirs)
        # One vector-Jacobian product at the last layer does not run through the compiled part.
        assert "Compiled" not in ours.grad_fn.name() and ours.grad_fn.next_functions
        for name in ("last_layer.weight", "body.weight"):
            gradients = [
                torch.autograd.grad(output.square().sum(), one.get_parameter(name), retain_graph=True)[0]
                for output, one in ((ours, network), (theirs, plain))
            ]
            torch.testing.assert_close(*gradients)
        torch.autograd.grad(ours.square().sum(), network.body.weight)  # again: the first freed nothing
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0


def test_compiled_code_loses_no_gradient():
    """Those below an upsampling in bfloat16, which torch 2.13's compiler for CPUs makes zero."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(8, 16, 3), torch.nn.Upsample(scale_factor=2.0), torch.nn.Conv2d(16, 16, 3))
    plain = torch.nn.Sequential(*layers, torch.nn.Conv2d(16, 8, 1)).to(memory_format=torch.channels_last)
    network, gradients = copy.deepcopy(plain), []
    compile_network(network)
    for each in (plain, network):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(torch.linspace(-1, 1, 1600).reshape(2, 8, 10, 10))
        output.float().square().sum().backward()
        gradients.append(each[0].weight.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * gradients[0].abs().max().item())
