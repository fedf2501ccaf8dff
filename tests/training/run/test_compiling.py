# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A compiled network is the same network, whatever the batch; its last layer can be differentiated alone."""

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
