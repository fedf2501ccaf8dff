"""Runs a training program with FSDP on a CPU, where Accelerate has none: `torchrun ... tests/helpers/sharded_on_cpu.py train_ctm OPTIONS`."""

import importlib
import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from training.cli.options import run_program
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
start = AcceleratorState.__init__


def start_sharded(self, *args, fsdp_plugin=None, **options):
    """As Accelerate does on GPUs."""
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = start_sharded
    program = importlib.import_module(f"training.{sys.argv.pop(1)}")
    run_program(program.main, {"training.train_ctm": CTMConfig, "training.train_edm": EDMConfig}[program.__name__])
    # Gloo's threads may still let go of tensors when the interpreter has begun to end, which aborts it (pytorch/pytorch#179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
