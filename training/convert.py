# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Convert official checkpoints: `python -m training.convert edm-cifar10-32x32-uncond-vp.pkl teachers/cifar10`."""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
from diffusers_ctm.preconditioning import EDMPrediction, Preconditioning, condition
from diffusers_ctm.two_times import image_size

from .cli.errors import UserError, loading
from .cli.files import atomic_file, atomic_folder, sha256, write_json
from .cli.options import BELOW_ONE, POSITIVE, Checked, option, run_program
from .cli.weights import check_finite, load_pipeline
from .data.latents import Autoencoder
from .hub.record import CONVERSION, origin_record
from .networks.autoencoder import load_autoencoder
from .official.download import fetch, shown
from .official.edm2 import note_on_weights
from .official.families import Family, family_of, find_family
from .official.files import read_checkpoint
from .official.layers import QKV_ORDERS, shapes_of
from .official.pickles import Record
from .official.weights import find_weights, weights_of


FORMATS = (".pt", ".pth", ".safetensors")
TOLERANCE = 1e-3  # of the output: equal weights at other addresses in memory may be summed in another order


@dataclass
class ConvertConfig(Checked):
    """Convert an official checkpoint to a folder that diffusers loads, or back. The file is read, never run."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "out")

    source: str | None = option(
        None,
        "The checkpoint: a file, a file on the Hub as user/repo/path/to/file.pt, or an https address. With --to "
        "official: a pipeline's folder or its repository on the Hub.",
    )
    out: str | None = option(None, "The folder to write. With --to official: the file, .pt or .safetensors.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    to: str = option(
        "diffusers",
        "'diffusers': a folder with a pipeline; 'official': a file with the authors' key names.",
        ["diffusers", "official"],
    )
    overwrite: bool = option(False, "Replace OUT if it is there.")
    entry: str | None = option(
        None, "Entry of the file that holds the weights, e.g. 'ema'. Default: averaged weights if there are any."
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    consistency_model: bool = option(
        False,
        "The file is a consistency model, which has the tensors of an EDM teacher: write a CTM that jumps to sigma_min "
        "only (gamma = 1).",
    )
    prediction_type: str = option(
        "edm",
        "What the network predicts: 'edm', or 'epsilon' (guided-diffusion), with the --beta_schedule of its 1,000 "
        "timesteps.",
        ["edm", "epsilon"],
    )
    beta_schedule: str | None = option(
        None,
        "With --prediction_type epsilon: 'linear', or 'squaredcos_cap_v2', which guided-diffusion calls cosine.",
        [None, "linear", "squaredcos_cap_v2"],
    )
    qkv_order: str | None = option(
        None,
        "Order of the channels of attention's qkv in an ADM network, slowest first, where the file does not tell: "
        "'head_three_dim' is guided-diffusion's default, 'three_head_dim' its use_new_attention_order. Default: the "
        "family's.",
        [None, *QKV_ORDERS],
    )
    num_head_channels: int | None = option(
        None, "Channels per attention head. Default: the family's.", must_be=POSITIVE
    )
    dropout: float | None = option(
        None, "Dropout in training. Default: what the file says, else the family's.", must_be=BELOW_ONE
    )
    sigma_data: float | None = option(
        None, "Standard deviation of the data. Default: what the file says, else the family's.", must_be=POSITIVE
    )
    timestep_scale: float | None = option(
        None,
        "The network is shown timestep_scale * ln(sigma) / 4: 1 or 1000. Default: the family's.",
        must_be=POSITIVE,
    )
    sigma_min: float | None = option(
        None,
        "Lowest noise level when sampling. Default: the family's, 0.002; with epsilon that of the first timestep.",
        must_be=POSITIVE,
    )
    sigma_max: float | None = option(
        None,
        "Highest noise level when sampling. Default: the family's, 80; with epsilon that of the last timestep.",
        must_be=POSITIVE,
    )
    num_train_timesteps: int | None = option(
        None,
        "Noise levels N of a CTM's training grid. Default: 18 below 64x64 pixels, 40 from there on.",
        must_be=POSITIVE,
    )
    vae: str | None = option(
        None,
        "The autoencoder of a network of latents, as diffusers has it: a folder or a repository on the Hub. That of "
        "EDM2's ImageNet-512 networks is stabilityai/sd-vae-ft-mse.",
    )
    vae_revision: str | None = option(
        None, "Branch, tag or commit of the autoencoder's repository. Default: main.", needs="vae"
    )
    flavour: str | None = option(None, "With --to official: whose key names, if the family has several.")
    id2label: str | None = option(
        None, 'JSON file with the names of the classes: {"0": "airplane", ...} or ["airplane", ...].'
    )
    license: str | None = option(
        None, "License of the weights, e.g. cc-by-nc-sa-4.0 (NVIDIA's EDM). Recorded for publishing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source or not self.out:
            raise UserError("SOURCE and OUT are needed: python -m training.convert SOURCE OUT. See --help.")
        if self.prediction_type == "edm":
            self.check((self.sigma_max or 80.0) > (self.sigma_min or 0.002), "sigma_max", "above sigma_min")
        if (self.prediction_type == "epsilon") != (self.beta_schedule is not None):
            raise UserError("--prediction_type epsilon and --beta_schedule are given together or not at all.")
        if self.prediction_type == "epsilon" and (self.consistency_model or self.timestep_scale or self.sigma_data):
            raise UserError(
                "--prediction_type epsilon has neither --sigma_data nor --timestep_scale and is no --consistency_model."
            )
        if self.to == "official":
            self.check(self.out.endswith(FORMATS), "out", f"a file that ends in one of {', '.join(FORMATS)}")
            self.check(
                self.qkv_order is None, "qkv_order", "left out with --to official, which writes the family's order"
            )

    def network_overrides(self) -> dict[str, Any]:
        """The arguments of the network that were given."""
        values = {"attention_head_dim": self.num_head_channels, "dropout": self.dropout, "qkv_order": self.qkv_order}
        return {name: value for name, value in values.items() if value is not None}


def network_of(family: Family, state_dict: dict[str, torch.Tensor], config: ConvertConfig, said: dict) -> UNet2DModel:
    """The network of the weights, by the options, what the file says and the family's defaults, in this order."""
    if config.prediction_type == "epsilon":
        state_dict = family.without_variances(state_dict)
    overrides = {name: value for name, value in said.items() if name != "sigma_data"} | config.network_overrides()
    network = family.to_diffusers(state_dict, **overrides)
    if network.config.out_channels == 2 * network.config.in_channels:
        raise UserError(
            f"The network gives {network.config.out_channels} channels for {network.config.in_channels}: it predicts "
            "variances too, as guided-diffusion's do, which predict epsilon. Give --prediction_type epsilon and "
            "--beta_schedule."
        )
    return network


def is_ctm(network: UNet2DModel) -> bool:
    return getattr(network, "has_target_time", False)


# To diffusers ---------------------------------------------------------------------------------------------------------


def make_pipeline(
    network: UNet2DModel, config: ConvertConfig, defaults: dict[str, Any], autoencoder: Autoencoder | None
) -> CTMPipeline:
    """The network with the scheduler of its kind, the names of its classes, and its autoencoder."""
    names = ("sigma_min", "sigma_max", "sigma_data", "timestep_scale")
    numbers = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.prediction_type == "edm":
        known = (*names, "prediction_type", "num_diffusion_timesteps")
        numbers = {name: defaults[name] for name in known if name in defaults} | numbers
    if config.consistency_model:
        if not isinstance(network, UNet2DModel) or is_ctm(network):
            raise UserError(
                f"--consistency_model is for OpenAI's networks with one time; this is a {type(network).__name__}."
            )
        network = CTMUNet2DModel.from_unet(network)
        numbers |= {"prediction_type": "consistency", "gamma": 1.0}
    if is_ctm(network):
        levels = config.num_train_timesteps or (40 if image_size(network)[0] >= 64 else 18)
        scheduler = CTMScheduler(num_train_timesteps=levels, **numbers)
    elif config.prediction_type == "epsilon":
        process = DDPMScheduler(beta_schedule=config.beta_schedule, prediction_type="epsilon")
        try:
            scheduler = EDMHeunScheduler.from_config(process.config, **numbers)
        except ValueError as error:
            raise UserError(f"--sigma_min or --sigma_max does not fit: {error}") from error
    else:
        scheduler = EDMHeunScheduler(**numbers)
    labels = read_labels(config.id2label, network.config.num_class_embeds)
    latent = {} if autoencoder is None else autoencoder.pipeline_options
    try:
        return CTMPipeline(network, scheduler, id2label=labels, **latent)
    except ValueError as error:
        raise UserError(f"--vae {config.vae} does not fit: {error}") from error


def autoencoder_for(network: UNet2DModel, family: Family, encoder: Any, config: ConvertConfig) -> Autoencoder | None:
    """The autoencoder of --vae with the family's numbers, for a network of latents; None for one of pixels.

    Raises UserError if it is missing, or the network sees pixels.
    """
    channels = network.config.in_channels
    if channels in (1, 3):
        config.check(config.vae is None, "vae", f"left out: the network sees images with {channels} channels")
        return None
    if config.vae is None:
        raise UserError(
            f"The network sees {channels} channels: latents. Give their autoencoder with --vae; that of EDM2's "
            "ImageNet-512 networks is stabilityai/sd-vae-ft-mse."
        )
    autoencoder = load_autoencoder(config.vae, config.vae_revision)
    numbers = family.latent_numbers(encoder)
    if numbers is None:
        return autoencoder
    autoencoder.network.register_to_config(scaling_factor=1.0, shift_factor=None, **numbers)
    return replace(autoencoder, normalize_images=False)


def read_labels(path: str | None, count: int | None) -> dict[int, str] | None:
    """The names of the classes in a JSON file, checked against the number of classes."""
    if path is None:
        return None
    with (
        loading(f"--id2label {path}", 'It must be a JSON file like {"0": "airplane"}.'),
        open(path, encoding="utf-8") as file,
    ):
        labels = json.load(file)
        labels = dict(enumerate(labels)) if isinstance(labels, list) else {int(i): name for i, name in labels.items()}
    if count is None:
        raise UserError(f"--id2label {path} was given, but the network is unconditional.")
    if sorted(labels) != list(range(count)) or not all(isinstance(name, str) for name in labels.values()):
        raise UserError(f"--id2label {path} must name the classes 0 to {count - 1}; it has {len(labels)} names.")
    return labels


@torch.no_grad()
def probe(network: UNet2DModel, timestep_scale: float) -> torch.Tensor:
    """The network's output for one fixed input: noise at level 1, target level 0.1, the last class."""
    noise = torch.randn(
        (1, network.config.in_channels, *image_size(network)), generator=torch.Generator().manual_seed(0)
    )
    c_noise = Preconditioning(timestep_scale=timestep_scale).c_noise
    times = [c_noise(torch.tensor([level])) for level in ([1.0, 0.1] if is_ctm(network) else [1.0])]
    classes = network.config.num_class_embeds
    labels = condition(None if classes is None else torch.tensor([classes - 1]))
    return network.eval()(noise.to(network.dtype), *times, **labels).sample


def check_same(network: UNet2DModel, other: UNet2DModel, timestep_scale: float, what: str) -> None:
    """Raise UserError unless both have the same weights to the bit and give the same output, a finite one."""
    expected, actual = probe(network, timestep_scale), probe(other, timestep_scale)
    if not expected.isfinite().all():
        raise UserError(
            "The network's output is not finite: its weights are nan, infinite or huge. Nothing was written."
        )
    difference = (expected - actual).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):  # also if it is nan
        raise UserError(
            f"{what} gives another output than the network that was converted: they differ by {difference}. Nothing "
            "was written."
        )
    weights = other.state_dict()
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, weights[name])]
    if changed:
        raise UserError(
            f"{what} has other weights than the network that was converted: {changed[0]}. Nothing was written."
        )


def describe(pipe: CTMPipeline, family: Family) -> str:
    """One line on what a pipeline is."""
    network, numbers = pipe.unet, pipe.scheduler.config
    classes = network.config.num_class_embeds
    edm = isinstance(pipe.scheduler.preconditioning.kind, EDMPrediction)
    kind = f"CTM with N = {numbers.num_train_timesteps}" if is_ctm(network) else "EDM teacher" if edm else "teacher"
    kind = "flow map" if is_ctm(network) and numbers.prediction_type == "flow_prediction" else kind
    labels = "unconditional" if classes is None else f"conditional on {classes} classes"
    height, width = image_size(network)
    return (
        f"Found: {kind}, {labels}, {height}x{width}x{network.config.in_channels}, {network.num_parameters():,} "
        f"parameters, family {family.NAME}, class {type(network).__name__}, "
        + (
            f"sigma_data {numbers.sigma_data:g}, timestep_scale {numbers.timestep_scale:g}"
            if edm
            else numbers.prediction_type
        )
    )


def to_diffusers(config: ConvertConfig, path: str) -> str:
    """Convert the checkpoint at `path` to the folder OUT, check it, and say what was found."""
    checkpoint = read_checkpoint(path)
    entry, part = find_weights(checkpoint, config.entry)
    weights = weights_of(part)
    values, size = sum(tensor.numel() for tensor in weights.values()), os.path.getsize(path)
    if values > size:  # of any dtype
        raise UserError(
            f"The file has {size:,} bytes and says {values:,} weights: its tensors repeat each other. Only tensors "
            "that do not are converted."
        )
    family, state_dict = find_family(weights)
    said = family.said_by(part) if isinstance(part, Record) else {}
    other = next((name for name, tensor in state_dict.items() if not tensor.is_floating_point()), None)
    if other is not None:
        raise UserError(f"{other} is of type {state_dict[other].dtype}; quantized weights are not converted.")
    check_finite(f"SOURCE {shown(config.source)}", state_dict)
    network = network_of(family, state_dict, config, said)
    encoder = checkpoint.get("encoder") if isinstance(checkpoint, dict) else None
    autoencoder = autoencoder_for(network, family, encoder, config)
    pipe = make_pipeline(network, config, family.defaults(shapes_of(state_dict)) | said, autoencoder)
    print(
        f"Read {shown(config.source)}: {size / 1e6:.1f} MB, "
        f"{f'entry {entry}' if entry else 'a state dict'} with {len(state_dict)} tensors",
        describe(pipe, family),
        sep="\n",
    )
    if said:
        values = (f"{value:g}" if isinstance(value, float) else str(value) for value in said.values())
        print(f"The file itself says: {', '.join(map(' '.join, zip(said, values)))}")
    others = [str(name)[:40] for name in checkpoint if str(name) != entry.partition(".")[0]] if entry else []
    if others:
        print(f"Left out: {', '.join(others[:20])}")
    if config.prediction_type == "edm" and not is_ctm(pipe.unet) and pipe.scheduler.config.timestep_scale == 1000:
        print("Note: a consistency model has the same tensors as an EDM teacher; for one, pass --consistency_model.")
    if note := note_on_weights(network):
        print(f"Note: {note}")
    record = {
        "source": shown(config.source),
        "revision": config.revision,
        "sha256": sha256(path),
        "entry": entry,
        "family": family.NAME,
        "license": config.license,
    }
    if autoencoder is not None:
        record["vae"] = origin_record(autoencoder.name, autoencoder.revision)
    with atomic_folder(config.out) as draft:
        pipe.save_pretrained(draft)
        write_json(record, CONVERSION, draft)
        again = CTMPipeline.from_pretrained(draft).unet
        check_same(pipe.unet, again, pipe.scheduler.config.timestep_scale, "The written folder")
    print(
        f"Wrote {config.out}\n"
        "Checked: loaded again, it gives the same output. The source has no outputs of its own to compare with."
    )
    if config.license is None:
        print(
            "License: not recorded; publishing will ask for it. Record it with --license: NVIDIA's EDM weights are "
            "cc-by-nc-sa-4.0, OpenAI's and the CTM authors' mit."
        )
    return config.out


# To official ----------------------------------------------------------------------------------------------------------


def to_official(config: ConvertConfig) -> str:
    """Write the network of the pipeline SOURCE with the authors' key names to the file OUT, and check it."""
    advice = "--to official takes a pipeline's folder or its repository on the Hub."
    pipe = load_pipeline(f"SOURCE {config.source}", config.source, advice, config.revision)
    if not hasattr(pipe, "unet"):
        raise UserError(f"SOURCE {config.source} is a {type(pipe).__name__}, which has no network named `unet`.")
    network = pipe.unet.eval()
    family = family_of(network)
    state_dict = family.to_official(network, config.flavour)
    with atomic_file(config.out) as draft:
        if config.out.endswith(".safetensors"):
            safetensors.torch.save_file(state_dict, draft)
        else:
            torch.save(state_dict, draft)
        again = family.to_diffusers(read_checkpoint(draft), **config.network_overrides())
        if image_size(again) != image_size(network):
            read, levels = image_size(again)[0], len(network.config.block_out_channels)
            raise UserError(
                f"The network makes images of {' x '.join(map(str, image_size(network)))} pixels. OpenAI's names do "
                f"not tell the size: a network of {levels} levels is read as one for {read} x {read}. Sizes are 8 x 8 "
                "for one level and twice as much for each level more."
            )
        scale = pipe.scheduler.config.get("timestep_scale", 1.0)
        check_same(network, again, scale, "Converted back (with these options), the file")
    print(
        f"Checked: converted back, it gives the same output.\n"
        f"Wrote {config.out}: {len(state_dict)} tensors with official names"
    )
    return config.out


# The program ----------------------------------------------------------------------------------------------------------


def check_out(config: ConvertConfig) -> None:
    """Raise UserError if OUT is there and may not be replaced."""
    path, is_folder = config.out, config.to == "diffusers"
    if not os.path.lexists(path) or (is_folder and os.path.isdir(path) and not os.listdir(path)):
        return
    if not config.overwrite:
        raise UserError(f"OUT {path} is there already; pass --overwrite to replace it, or another name.")
    if not os.path.isfile(os.path.join(path, "model_index.json") if is_folder else path):
        kind = "pipeline's folder" if is_folder else "file"
        raise UserError(f"OUT {path} is no {kind} and is not replaced, --overwrite or not.")


def main(config: ConvertConfig) -> str:
    """Convert; return OUT. Raises UserError, and then OUT is as it was."""
    check_out(config)
    if config.to == "official":
        return to_official(config)
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        return to_diffusers(config, fetch(config.source, config.revision, folder))


if __name__ == "__main__":
    run_program(main, ConvertConfig)
