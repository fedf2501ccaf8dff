"""Convert checkpoints of EDM and CTM: `python -m training.convert edm-cifar10-32x32-uncond-vp.pkl teachers/cifar10`."""

import http.client
import importlib
import json
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import safetensors.torch
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
from diffusers_ctm.trajectory import c_noise

from . import convert_adm, convert_edm
from .config import Checked, UserError, option, run_program
from .convert_adm import QKV_ORDERS
from .files import atomic_file, atomic_folder, sha256
from .hub import error_text
from .unpickle import Record, find_weights, module_numbers, read_checkpoint, weights_of


@dataclass(frozen=True)
class Family:
    """A family of official networks.

    Args:
        module: a module of this package with `matches(shapes) -> bool` (is a state dict with these names and shapes of the family?),
            `to_diffusers(state_dict, **overrides) -> network` (UserError names what does not fit), `to_official(network) -> dict`
            (the authors' key names), and `defaults(shapes) -> dict` or `DEFAULTS`: what shapes do not tell.
        classes: names of the network classes that it makes.
        head: its override for the channels per attention head.
        orders: whether its networks differ in the order of attention's channels (`qkv_order`).
    """

    module: ModuleType
    classes: tuple[str, ...]
    head: str = "num_head_channels"
    orders: bool = False


FAMILIES = {
    "edm": Family(convert_edm, ("EDMUNet2DModel",), head="attention_head_dim"),
    "adm": Family(convert_adm, ("UNet2DModel", "CTMUNet2DModel"), orders=True),
}

COUNTERS = {"n_averaged"}  # what torch's AveragedModel holds beside the network
MAX_NAME = 200  # characters; those of official networks have fewer than 80
FORMATS = (".pt", ".pth", ".safetensors")
MAX_DOWNLOAD = 2**35  # bytes
MAX_SIDE = 1024  # pixels; names that say more would make the check of the result cost any amount of memory
CHUNK = 2**20
TOLERANCE = 1e-3  # of the output: equal weights at other addresses in memory may be summed in another order


@dataclass
class ConvertConfig(Checked):
    """Convert an official checkpoint to a folder that diffusers loads, or back. The file is read, never run."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "out")

    source: str | None = option(
        None,
        "The checkpoint: a file, a file on the Hub as user/repo/path/to/file.pt, or an https address. With --to official: a "
        "pipeline's folder or its repository on the Hub.",
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
        "The file is a consistency model, which has the tensors of an EDM teacher: write a CTM that jumps to sigma_min only (gamma = 1).",
    )
    prediction_type: str = option(
        "edm",
        "What the network predicts: 'edm', or 'epsilon' (guided-diffusion), with the --beta_schedule of its 1,000 timesteps.",
        ["edm", "epsilon"],
    )
    beta_schedule: str | None = option(
        None,
        "With --prediction_type epsilon: 'linear', or 'squaredcos_cap_v2', which guided-diffusion calls cosine.",
        [None, "linear", "squaredcos_cap_v2"],
    )
    qkv_order: str | None = option(
        None,
        "Order of the channels of attention's qkv in an ADM network, slowest first, where the file does not tell: 'head_three_dim' is "
        "guided-diffusion's default, 'three_head_dim' its use_new_attention_order. Default: the family's.",
        [None, *QKV_ORDERS],
    )
    num_head_channels: int | None = option(None, "Channels per attention head. Default: the family's.")
    dropout: float | None = option(None, "Dropout in training. Default: what the file says, else the family's.")
    sigma_data: float | None = option(
        None, "Standard deviation of the data. Default: what the file says, else the family's."
    )
    timestep_scale: float | None = option(
        None, "The network is shown timestep_scale * ln(sigma) / 4: 1 or 1000. Default: the family's."
    )
    sigma_min: float | None = option(
        None, "Lowest noise level when sampling. Default: 0.002; with epsilon that of the first timestep."
    )
    sigma_max: float | None = option(
        None, "Highest noise level when sampling. Default: 80; with epsilon that of the last timestep."
    )
    num_train_timesteps: int | None = option(
        None, "Noise levels N of a CTM's training grid. Default: 18 below 64x64 pixels, 40 from there on."
    )
    flavour: str | None = option(None, "With --to official: whose key names, if the family has several.")
    id2label: str | None = option(
        None, 'JSON file with the names of the classes: {"0": "airplane", ...} or ["airplane", ...].'
    )
    license: str | None = option(
        None, "Licence of the weights, e.g. cc-by-nc-sa-4.0 (NVIDIA's EDM). Recorded for publishing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source or not self.out:
            raise UserError("SOURCE and OUT are needed: python -m training.convert SOURCE OUT. See --help.")
        for name in (
            "num_head_channels",
            "sigma_data",
            "timestep_scale",
            "num_train_timesteps",
            "sigma_min",
            "sigma_max",
        ):
            value = getattr(self, name)
            self.check(value is None or value > 0, name, "positive")
        if self.prediction_type == "edm":
            self.sigma_min, self.sigma_max = self.sigma_min or 0.002, self.sigma_max or 80.0
            self.check(self.sigma_max > self.sigma_min, "sigma_max", "above sigma_min")
        self.check(self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        if (self.prediction_type == "epsilon") != (self.beta_schedule is not None):
            raise UserError("--prediction_type epsilon and --beta_schedule are given together or not at all.")
        if self.prediction_type == "epsilon" and (self.consistency_model or self.timestep_scale or self.sigma_data):
            raise UserError(
                "--prediction_type epsilon has neither --sigma_data nor --timestep_scale, and is no --consistency_model."
            )
        if self.to == "official":
            self.check(self.out.endswith(FORMATS), "out", f"a file that ends in one of {', '.join(FORMATS)}")
            self.check(
                self.qkv_order is None, "qkv_order", "left out with --to official, which writes the family's order"
            )

    def network_overrides(self, family: str) -> dict[str, Any]:
        """What the user said about the network, in the family's words."""
        values = {FAMILIES[family].head: self.num_head_channels, "dropout": self.dropout, "qkv_order": self.qkv_order}
        if self.qkv_order is not None and not FAMILIES[family].orders:
            raise UserError(f"--qkv_order is for ADM networks; this one is of the family {family}.")
        return {name: value for name, value in values.items() if value is not None}


# The source -----------------------------------------------------------------------------------------------------------


def is_address(source: str) -> bool:
    return source.lower().startswith(("https://", "http://"))


def public_name(source: str) -> str:
    """`source` as it may be shown and recorded: an address without user, password and query, a local file without its folders."""
    if is_address(source):
        parts = urllib.parse.urlsplit(source)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) else source


def fetch(source: str, revision: str | None, folder: str) -> str:
    """The path of the checkpoint `source`, downloaded into `folder` if it is an address.

    Raises UserError if it is not there, or its name could be none of the three.
    """
    if is_address(source):
        return download(source, folder)
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise UserError(f"SOURCE {source} is a folder; pass the checkpoint's file, or --to official for a pipeline.")
    parts = source.split("/")
    if len(parts) < 3 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"SOURCE {source} is not there. Pass a file, a file on the Hub as user/repo/file.pt, or an https address."
        )
    try:
        return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision)
    except Exception as error:  # huggingface_hub raises many kinds
        raise UserError(
            f"SOURCE {source} is neither a file here nor one that can be had from the Hub: {error_text(error)}"
        ) from error


def check_address(address: str, local: bool = True) -> None:
    """Raise UserError unless `address` is https without a password, or (if `local`) http on this machine."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme != "https" and not (local and parts.scheme == "http" and parts.hostname == "127.0.0.1"):
        raise UserError(f"SOURCE {public_name(address)} is no https address; others are not downloaded.")
    if "@" in parts.netloc:
        raise UserError(
            f"SOURCE {public_name(address)} has a user or a password in its address, which is not supported."
        )


class _OnlySecure(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https only, or on this machine if it comes from there: no website reaches what is served here."""

    def redirect_request(self, request, file, code, message, headers, address):
        check_address(address, local=request.type == "http")
        return super().redirect_request(request, file, code, message, headers, address)


def download(address: str, folder: str) -> str:
    """Fetch `address` into `folder`; return the file's path. UserError if it does not come whole."""
    check_address(address)
    path = os.path.join(folder, "download")
    name = public_name(address)
    try:
        with urllib.request.build_opener(_OnlySecure).open(address, timeout=60) as answer, open(path, "wb") as file:
            announced = answer.headers.get("Content-Length")
            expected = int(announced) if announced is not None else None
            received = 0
            with tqdm(total=expected, unit="B", unit_scale=True, desc=os.path.basename(name)) as progress:
                while chunk := answer.read(CHUNK):
                    received += len(chunk)
                    if received > MAX_DOWNLOAD:
                        raise UserError(f"SOURCE {name} is larger than {MAX_DOWNLOAD / 2**30:.0f} GiB.")
                    file.write(chunk)
                    progress.update(len(chunk))
    except http.client.InvalidURL as error:  # whose text repeats the address, query and all
        raise UserError(f"SOURCE {name} is no proper address; spaces, for instance, are written as %20.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        reason = f"{error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else error
        raise UserError(f"SOURCE {name} cannot be downloaded: {reason}.") from error
    if expected is not None and received != expected:
        raise UserError(f"SOURCE {name} broke off after {received:,} of {expected:,} bytes. Try again.")
    return path


# Families -------------------------------------------------------------------------------------------------------------


def family_module(family: str) -> ModuleType:
    return FAMILIES[family].module


def find_family(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """(family, state dict without wrappers' prefixes), recognised by key names and shapes.

    What DistributedDataParallel, torch.compile or a trainer's module put before every name ("module.", "_orig_mod.", "net.", several
    of them) is left out where the names with it are known to no family. Raises UserError if it is of no family.
    """
    bare = {name: tensor for name, tensor in state_dict.items() if name not in COUNTERS}
    while bare and all(len(name) <= MAX_NAME for name in bare):
        for family in FAMILIES:
            if family_module(family).matches(shapes_of(bare)):
                return family, bare
        prefix = next(iter(bare)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in bare):
            break
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    some = ", ".join(f"{name[:60]} {list(tensor.shape)}" for name, tensor in list(state_dict.items())[:4])
    raise UserError(
        f"These weights are of no network that is known here ({len(state_dict)} tensors: {some}, ...). Known are EDM's DDPM++, NCSN++ "
        "and ADM, OpenAI's ADM, and the CTMs of both."
    )


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def family_defaults(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the family knows that shapes do not tell."""
    module = family_module(family)
    return module.defaults(shapes) if hasattr(module, "defaults") else dict(module.DEFAULTS)


def said_by(part: Any) -> dict[str, float]:
    """What a pickled network says of itself beside its weights: `sigma_data` and `dropout`. Nothing of a state dict.

    Raises UserError if it is one of NVIDIA's other preconditionings, whose tensors are named alike.
    """
    if not isinstance(part, Record):
        return {}
    name = part.class_name.rpartition(".")[2]
    if name.endswith("Precond") and name != "EDMPrecond":
        raise UserError(
            f"The file holds a {name[:40]}, not an EDMPrecond: the networks of NVIDIA's baselines predict something else and are shown other "
            "times. Only those with EDM's preconditioning are converted."
        )
    found = {key: module_numbers(part, key) for key in ("sigma_data", "dropout")}
    said = {key: values.pop() for key, values in found.items() if len(values) == 1}
    return {key: value for key, value in said.items() if value > 0 and (key != "dropout" or value < 1)}


def network_of(family: str, state_dict: dict[str, torch.Tensor], config: ConvertConfig, said: dict) -> UNet2DModel:
    """The network of the weights, by the options, what the file says and the family's defaults, in this order."""
    module = family_module(family)
    if config.prediction_type == "epsilon":
        if not hasattr(module, "without_variances"):
            raise UserError(f"--prediction_type epsilon is for OpenAI's networks; this one is of the family {family}.")
        state_dict = module.without_variances(state_dict)
    overrides = {name: said[name] for name in ("dropout",) if name in said} | config.network_overrides(family)
    network = module.to_diffusers(state_dict, **overrides).eval()
    if max(_size(network)) > MAX_SIDE:
        raise UserError(f"The names say images of {max(_size(network))} pixels a side; up to {MAX_SIDE} are converted.")
    if network.config.out_channels == 2 * network.config.in_channels:
        raise UserError(
            f"The network gives {network.config.out_channels} channels for {network.config.in_channels}: it predicts variances too, as "
            "guided-diffusion's do, which predict epsilon. Give --prediction_type epsilon and --beta_schedule."
        )
    return network


def is_ctm(network: UNet2DModel) -> bool:
    return getattr(network, "has_target_time", False)


# To diffusers ---------------------------------------------------------------------------------------------------------


def make_pipeline(network: UNet2DModel, config: ConvertConfig, defaults: Mapping[str, Any]) -> CTMPipeline:
    """The network with the scheduler of its kind and the names of its classes."""
    names = ("sigma_min", "sigma_max", "sigma_data", "timestep_scale")
    numbers = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.prediction_type == "edm":
        numbers = {name: defaults[name] for name in ("sigma_data", "timestep_scale")} | numbers
    if config.consistency_model:
        if not isinstance(network, UNet2DModel) or is_ctm(network):
            raise UserError(
                f"--consistency_model is for OpenAI's networks with one time; this is a {type(network).__name__}."
            )
        network = CTMUNet2DModel.from_unet(network)
        numbers |= {"prediction_type": "consistency", "gamma": 1.0}
    if is_ctm(network):
        levels = config.num_train_timesteps or (40 if _size(network)[0] >= 64 else 18)
        scheduler = CTMScheduler(num_train_timesteps=levels, **numbers)
    elif config.prediction_type == "epsilon":
        process = DDPMScheduler(beta_schedule=config.beta_schedule, prediction_type="epsilon")
        try:
            scheduler = EDMHeunScheduler.from_config(process.config, **numbers)
        except ValueError as error:
            raise UserError(f"--sigma_min or --sigma_max does not fit: {error}") from error
    else:
        scheduler = EDMHeunScheduler(**numbers)
    return CTMPipeline(network, scheduler, id2label=read_labels(config.id2label, network.config.num_class_embeds))


def read_labels(path: str | None, count: int | None) -> dict[int, str] | None:
    """The names of the classes in a JSON file, checked against the number of classes."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            labels = json.load(file)
        labels = dict(enumerate(labels)) if isinstance(labels, list) else {int(i): name for i, name in labels.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f'--id2label {path} must be a JSON file like {{"0": "airplane"}}: {error}') from error
    if not all(isinstance(name, str) for name in labels.values()):
        raise UserError(f"--id2label {path} must give every class a name.")
    if count is None:
        raise UserError(f"--id2label {path} was given, but the network is unconditional.")
    if sorted(labels) != list(range(count)):
        raise UserError(f"--id2label {path} must name the classes 0 to {count - 1}; it has {len(labels)} names.")
    return labels


def _size(network: UNet2DModel) -> tuple[int, int]:
    size = network.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def probe(network: UNet2DModel, timestep_scale: float) -> torch.Tensor:
    """The network's output for one fixed input: noise at level 1, target level 0.1, the last class."""
    noise = torch.randn((1, network.config.in_channels, *_size(network)), generator=torch.Generator().manual_seed(0))
    times = [c_noise(torch.tensor([1.0]), timestep_scale)]
    if is_ctm(network):
        times.append(c_noise(torch.tensor([0.1]), timestep_scale))
    classes = network.config.num_class_embeds
    condition = {} if classes is None else {"class_labels": torch.tensor([classes - 1])}
    return network.eval()(noise.to(network.dtype), *times, **condition).sample


def check_same(network: UNet2DModel, other: UNet2DModel, timestep_scale: float, what: str) -> None:
    """Raise UserError unless both have the same weights to the bit and give the same output, a finite one."""
    expected, found = probe(network, timestep_scale), probe(other, timestep_scale)
    if not expected.isfinite().all():
        raise UserError(
            "The network's output is not finite: its weights are nan, infinite or huge. Nothing was written."
        )
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):  # also if it is nan
        raise UserError(
            f"{what} gives another output than the network that was converted: they differ by {difference}. Nothing was written."
        )
    weights = other.state_dict()
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, weights[name])]
    if changed:
        raise UserError(
            f"{what} has other weights than the network that was converted: {changed[0]}. Nothing was written."
        )


def describe(pipe: CTMPipeline, family: str) -> str:
    """One line on what a pipeline is."""
    network, numbers = pipe.unet, pipe.scheduler.config
    classes = network.config.num_class_embeds
    edm = numbers.prediction_type != "epsilon"
    kind = f"CTM with N = {numbers.num_train_timesteps}" if is_ctm(network) else "EDM teacher" if edm else "teacher"
    labels = "unconditional" if classes is None else f"conditional on {classes} classes"
    count = sum(parameter.numel() for parameter in network.parameters())
    height, width = _size(network)
    return (
        f"Found: {kind}, {labels}, {height}x{width}x{network.config.in_channels}, {count:,} parameters, "
        f"family {family}, class {type(network).__name__}, "
        + (f"sigma_data {numbers.sigma_data:g}, timestep_scale {numbers.timestep_scale:g}" if edm else "epsilon")
    )


def left_out(checkpoint: Any, entry: str) -> list[str]:
    """Other entries of the file, beside that of the weights."""
    if not entry or not isinstance(checkpoint, dict):
        return []
    return [str(name)[:40] for name in checkpoint if str(name) != entry.partition(".")[0]][:20]


def to_diffusers(config: ConvertConfig, path: str) -> str:
    """Convert the checkpoint at `path` to the folder OUT, check it, and say what was found."""
    checkpoint = read_checkpoint(path)
    entry, part = find_weights(checkpoint, config.entry)
    said = said_by(part)
    weights = weights_of(part)
    values, size = sum(tensor.numel() for tensor in weights.values()), os.path.getsize(path)
    if values > size:  # of any dtype
        raise UserError(
            f"The file has {size:,} bytes and says {values:,} weights: its tensors repeat each other. Weights of their own are converted."
        )
    family, state_dict = find_family(weights)
    other = next((name for name, tensor in state_dict.items() if not tensor.is_floating_point()), None)
    if other is not None:
        raise UserError(f"{other} is of type {state_dict[other].dtype}; quantised weights are not converted.")
    network = network_of(family, state_dict, config, said)
    pipe = make_pipeline(network, config, family_defaults(family, shapes_of(state_dict)) | said)
    print(
        f"Read {public_name(config.source)}: {size / 1e6:.1f} MB, "
        f"{f'entry {entry}' if entry else 'a state dict'} with {len(state_dict)} tensors",
        describe(pipe, family),
        sep="\n",
    )
    if said:
        print(f"The file itself says: {', '.join(f'{name} {value:g}' for name, value in said.items())}")
    others = left_out(checkpoint, entry)
    if others:
        print(f"Left out: {', '.join(others)}")
    if config.prediction_type == "edm" and not is_ctm(pipe.unet) and pipe.scheduler.config.timestep_scale == 1000:
        print("Note: a consistency model has the same tensors as an EDM teacher; for one, pass --consistency_model.")
    record = {
        "source": public_name(config.source),
        "revision": config.revision,
        "sha256": sha256(path),
        "entry": entry,
        "family": family,
        "license": config.license,
    }
    with atomic_folder(config.out) as draft:
        pipe.save_pretrained(draft)
        with open(os.path.join(draft, "conversion.json"), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.write("\n")
        again = CTMPipeline.from_pretrained(draft)
        check_same(pipe.unet, again.unet, pipe.scheduler.config.timestep_scale, "The written folder")
    print("Checked: loaded again, it gives the same output. The source has no outputs of its own to compare with.")
    if config.license is None:
        print(
            "Licence: not recorded; publishing will ask for it. Record it with --license: NVIDIA's EDM weights are cc-by-nc-sa-4.0, OpenAI's and "
            "the CTM authors' mit."
        )
    print(f"Wrote {config.out}")
    return config.out


# To official ----------------------------------------------------------------------------------------------------------


def load_pipeline(config: ConvertConfig) -> DiffusionPipeline:
    try:
        pipe = DiffusionPipeline.from_pretrained(config.source, revision=config.revision)
    except Exception as error:  # huggingface_hub, safetensors and diffusers each raise their own
        raise UserError(
            f"SOURCE {config.source} cannot be loaded; --to official takes a pipeline's folder or its repository on the Hub.\n"
            f"{error_text(error)}"
        ) from error
    if not hasattr(pipe, "unet"):
        raise UserError(f"SOURCE {config.source} is a {type(pipe).__name__}, which has no network named `unet`.")
    return pipe


def to_official(config: ConvertConfig) -> str:
    """Write the network of the pipeline SOURCE with the authors' key names to the file OUT, and check it."""
    pipe = load_pipeline(config)
    network = pipe.unet.eval()
    kind = type(network).__name__
    family = next((name for name, family in FAMILIES.items() if kind in family.classes), None)
    if family is None:
        raise UserError(f"SOURCE {config.source} has a {kind}, which has no official form.")
    module = family_module(family)
    flavour = {} if config.flavour is None else {"flavour": config.flavour}
    state_dict = {name: tensor.contiguous() for name, tensor in module.to_official(network, **flavour).items()}
    scale = pipe.scheduler.config.get("timestep_scale", 1.0)
    with atomic_file(config.out) as draft:
        if config.out.endswith(".safetensors"):
            safetensors.torch.save_file({name: tensor.clone() for name, tensor in state_dict.items()}, draft)
        else:
            torch.save(state_dict, draft)
        again = module.to_diffusers(read_checkpoint(draft), **config.network_overrides(family))
        check_same(network, again, scale, "Converted back (with these options), the file")
    print(
        f"Checked: converted back, it gives the same output.\nWrote {config.out}: {len(state_dict)} tensors with official names"
    )
    return config.out


# The program ----------------------------------------------------------------------------------------------------------


def check_out(config: ConvertConfig) -> None:
    """Raise UserError if OUT is there and may not be replaced."""
    path, folder = config.out, config.to == "diffusers"
    if not os.path.lexists(path):
        return
    if folder and os.path.isdir(path) and not os.listdir(path):
        return
    if not config.overwrite:
        raise UserError(f"OUT {path} is there already; pass --overwrite to replace it, or another name.")
    if folder and not os.path.isfile(os.path.join(path, "model_index.json")):
        raise UserError(f"OUT {path} is no pipeline's folder and is not replaced, --overwrite or not.")
    if not folder and not os.path.isfile(path):
        raise UserError(f"OUT {path} is no file and is not replaced, --overwrite or not.")


def main(config: ConvertConfig) -> str:
    """Convert; return OUT. Raises UserError, and then OUT is as it was."""
    check_out(config)
    if config.to == "official":
        return to_official(config)
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        return to_diffusers(config, fetch(config.source, config.revision, folder))


if __name__ == "__main__":
    run_program(main, ConvertConfig)
