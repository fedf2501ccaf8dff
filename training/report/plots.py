"""What every plot has: the palette, plain ticks, a PNG as bytes."""

import math

from .numbers import number


def _plain_ticks(axes) -> None:
    """Distances at 1, 2, 5 times powers of ten, in plain digits."""
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high] or [low, high]
    axes.set_yticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
