# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM and SIGINT end a run after its step."""

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator


IMPATIENCE = 2.0  # seconds; launchers repeat the first Ctrl-C within them, a later one is the user's


class Interruption:
    """Within this block the first SIGTERM or SIGINT is noted, and `agreed` says when to stop for it.

    A second SIGINT, later than launchers repeat the first, interrupts at once. Signals reach the main thread only: in
    another thread the block changes nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self._since = 0.0
        self._former: dict[int, object] = {}
        self._exchange: tuple[Callable[[], object], torch.Tensor] | None = None  # how to wait for the last one, and its result

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for signum, former in self._former.items():
            signal.signal(signum, signal.SIG_DFL if former is None else former)
        if self._exchange is not None and kind is None:  # else another process may be gone
            self._exchange[0]()

    def _note(self, signum: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = signum, time.monotonic()
            if self.accelerator.is_local_main_process:  # print() is not safe within a handler
                os.write(2, b"\nStopping after this step, with a checkpoint ...\n")
        elif signum == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """The signal for which every process stops now, or 0. All processes call it after each step.

        Signals reach processes in different steps. Processes exchange them in the background and read the result one step
        later: no GPU waits for it.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        result = 0
        if self._exchange is not None:
            wait, received = self._exchange
            wait()
            result = int(received)
        received = torch.full((), self.received, device=self.accelerator.device)
        work = torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, async_op=True)
        wait = work.wait
        if received.is_cuda:
            # A copy on the host is read a step later: a look at the GPU would wait for that step too.
            work.wait()  # orders the streams, does not hold up this process
            received, done = received.to("cpu", non_blocking=True), torch.cuda.Event()
            done.record()
            wait = done.synchronize
        self._exchange = (wait, received)
        return result
