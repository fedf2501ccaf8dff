# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Runs take turns; a later movement of a control ends the run before it."""

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar

import gradio as gr


MOST_TURN = 64  # characters of a turn

# Each run of an open page has a turn, a name that nobody else can guess. Networks are shared, so a turn stops its run
# alone, before the next network evaluation of its thread.
TURN: ContextVar[str | None] = ContextVar("TURN", default=None)

STOPPED: deque[str] = deque(maxlen=1024)  # turns, the newest last


class Superseded(Exception):
    """A run ends early, as the page has moved on."""


def in_turn(call: Callable) -> Callable:
    """`call` for the page: its last argument is its turn, by which a later movement ends it. The old result stays."""

    def run(*arguments):
        token = TURN.set(str(arguments[-1])[:MOST_TURN])
        try:
            return call(*arguments[:-1])
        except Superseded:
            return gr.skip()
        finally:
            TURN.reset(token)

    return run
