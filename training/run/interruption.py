# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM and SIGINT end a run after its step."""

import os
import signal
import threading
import time

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
        self._exchanged = torch.zeros(())  # the signals of all processes in the last step
        self._copied: torch.cuda.Event | None = None  # happens when they have come from the GPU

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        for signum, former in self._former.items():
            signal.signal(signum, signal.SIG_DFL if former is None else former)

    def _note(self, signum: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = signum, time.monotonic()
            if self.accelerator.is_local_main_process:  # print() is not safe within a handler
                os.write(2, b"\nStopping after this step, with a checkpoint ...\n")
        elif signum == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """The signal for which every process stops now, or 0. All processes call it after each step.

        Signals reach processes in different steps. The processes exchange them after one step and read the result after
        the next, so that nobody waits for a GPU to finish the step.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        if self._copied is not None:
            self._copied.synchronize()
        signum = int(self._exchanged)
        received = torch.full((), self.received, device=self.accelerator.device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        self._exchanged = received.to("cpu", non_blocking=True)
        if received.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return signum
