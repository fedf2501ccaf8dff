import torch

from training.ema import EMA


def network(value):
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(value)
    return layer


def move(ema, values):
    for value in values:
        ema.step(network(value))
    return ema.module.weight[0, 0].item()


def test_constant_decay():
    ema = EMA(network(1.0), decay=0.9)
    expected = 1.0
    for number, value in enumerate([2.0, 3.0, -1.0]):
        decay = 0.9 if number else 0.0  # the first step copies, as diffusers' EMAModel does
        expected = decay * expected + (1 - decay) * value
        assert abs(move(ema, [value]) - expected) < 1e-6


def test_warmup_rises_to_the_decay():
    ema = EMA(network(0.0), decay=0.5, warmup=True)
    expected = 0.0
    for step in range(12):
        decay = min((1 + step) / (10 + step), 0.5) if step else 0.0
        expected = decay * expected + (1 - decay) * (step + 1.0)
        assert abs(move(ema, [step + 1.0]) - expected) < 1e-5
    assert decay == 0.5


def test_module_is_the_average_and_stays_it_after_loading():
    ema = EMA(network(1.0), decay=0.9)
    move(ema, [2.0, 3.0])
    weight = ema.module.weight
    other = EMA(network(5.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert move(other, [7.0]) == move(ema, [7.0])
    assert ema.module.weight is weight and not weight.requires_grad and not ema.module.training
