# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The palette, the axes and the ticks that plots share."""

import math

from .numbers import number


PALETTE = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's, for color-blind readers


def new_figure(width: float, height: float, columns: int = 1, dpi: int = 120, **options):
    """(a figure of this size in inches, its axes), drawn without a display; `options` are those of `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def plain_ticks(axes) -> None:
    """Label a logarithmic axis in plain digits, at powers of ten and as many multiples as give it three labels."""
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), range(1, 10), [half / 2 for half in range(2, 20)]):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks or [low, high]
    axes.set_yticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
