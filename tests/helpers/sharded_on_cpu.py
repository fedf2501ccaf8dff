# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""FSDP on a CPU, where Accelerate has none."""

import os
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def sharded(main: Callable, config: Any) -> None:
    """Run a training program in one of several processes with its weights spread over them."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    start = AcceleratorState.__init__

    def start_sharded(self, *args, fsdp_plugin=None, **options):
        """As Accelerate does on GPUs."""
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = start_sharded
    main(config)
