"""Networks whose features say how alike two sets of images are, and the training of the embedded one for digits.

python -m training.features --output_dir assets/digits-features
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .config import DataOptions, UserError, option, run_program
from .data import ImageDataset, to_sample
from .files import atomic_folder, check_writable


FEATURES_HELP = (
    "Network whose features are compared: 'digits' (embedded), a folder that training.features saved, FID's Inception or "
    "another TorchScript file (.pt, which runs the code inside: give only files that you trust), or an image model of "
    "transformers, by its folder or Hub id."
)
EMBEDDED = {"digits": Path(__file__).parent.parent / "assets" / "digits-features"}
INCEPTION_SIDE = 299  # pixels


class FeatureNetwork(nn.Module):
    """A small classifier of small images; what its last layer reads are the features.

    Four 3x3 convolutions, halved resolution after the second, and the mean over positions. Batch normalisation, fixed once
    trained, so that contrast and brightness reach the features; normalising each image by itself would hide them.

    Args:
        channels: 1 (grey; the channels of colour images are averaged) or 3.
        resolution: height and width in pixels of its images.
        num_classes: that it tells apart.
        num_features: width of the features.
    """

    def __init__(self, channels: int = 1, resolution: int = 8, num_classes: int = 10, num_features: int = 64):
        super().__init__()
        self.config = {
            "channels": channels,
            "resolution": resolution,
            "num_classes": num_classes,
            "num_features": num_features,
        }
        self.num_features = num_features
        self.about = dict(self.config)
        half = num_features // 2
        self.body = nn.Sequential(
            *_convolution(channels, half),
            *_convolution(half, half),
            nn.MaxPool2d(2),
            *_convolution(half, num_features),
            *_convolution(num_features, num_features),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(num_features, num_classes)

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Raise UserError for images of another size than it was trained on."""
        side = self.config["resolution"]
        if (height, width) != (side, side):
            raise UserError(
                f"--features is a network for {side}x{side} images, these are {height}x{width}. Use a folder that "
                "training.features made from such images, FID's Inception, or an image model of transformers."
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 of shape (B, num_features), of uint8 images (B, 1 or 3, resolution, resolution)."""
        x = to_sample(images)
        wanted = self.config["channels"]
        if x.shape[1] != wanted:
            x = x.mean(1, keepdim=True).expand(-1, wanted, -1, -1)
        return self.body(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), of samples in [-1, 1] with the network's channels; differentiable, as guidance needs them."""
        return self.classifier(self.body(x))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Class of each image, int64 of shape (B,)."""
        return self.classifier(self(images)).argmax(1)


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


# Loading ------------------------------------------------------------------------------------------------------------


def load_feature_network(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The feature network `name` (see `FEATURES_HELP`), frozen, in evaluation mode, on `device`.

    It takes uint8 images of shape (B, 1 or 3, H, W) and returns float32 features of shape (B, num_features), as torchmetrics'
    `FrechetInceptionDistance(feature=...)` asks. `about` describes it in JSON's types; `check_images(channels, height, width)`
    raises UserError for images that it does not take.

    Raises UserError if it is not there or is no network for images.
    """
    try:
        kind, folder = kind_of(name)
        if kind == "classifier":
            network = load_saved(folder)
        elif kind == "file":
            network = TorchScriptFeatures(str(folder), device)
        else:
            network = TransformersFeatures(name)
        network = network.to(device).requires_grad_(False).eval()
        network.about = {"name": name, "num_features": network.num_features, **network.about}
    except UserError as error:
        raise UserError(f"--features {name}: {error}") from error
    except Exception as error:  # torch, safetensors, transformers and huggingface_hub each raise their own
        raise UserError(
            f"--features {name} cannot be loaded. {FEATURES_HELP}\n{type(error).__name__}: {str(error).strip()}"
        ) from error
    return network


def kind_of(name: str) -> tuple[str, Path]:
    """What network `name` says, and its path: "classifier" (a folder of this program), "file" or "transformers" (folder or Hub id).

    Raises UserError if it is the embedded one and that is missing.
    """
    folder = EMBEDDED.get(name, Path(name)) if not os.path.exists(name) else Path(name)
    if name in EMBEDDED and not folder.is_dir():
        raise UserError(f"{folder.name} is missing; make it with `python -m training.features`.")
    if _config_of(folder).get("_class_name") == FeatureNetwork.__name__:
        return "classifier", folder
    if folder.is_file() or folder.suffix in (".pt", ".pth", ".ts"):
        return "file", folder
    return "transformers", folder


def _config_of(folder: Path) -> dict:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load_saved(folder: str | Path) -> FeatureNetwork:
    """A network that this program saved; `about` holds its config, accuracy included. On the CPU."""
    folder = Path(folder)
    config = _config_of(folder)
    network = FeatureNetwork(**{name: config[name] for name in FeatureNetwork().config})
    network.load_state_dict(load_file(folder / "model.safetensors"))
    network.about = {name: value for name, value in config.items() if name not in ("_class_name", "options")}
    return network.eval()


class ResizedFeatures(nn.Module):
    """Base of networks that see colour images of one size: repeats grey, resizes and normalises."""

    def __init__(self, side: tuple[int, int], mode: str):
        super().__init__()
        self.side, self.mode = side, mode

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Takes images of every size."""

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 1 or 3, H, W) to float32 (B, 3, *side), values in 0..255."""
        x = images.to(torch.float32).expand(-1, 3, -1, -1)
        if x.shape[-2:] != torch.Size(self.side):
            x = F.interpolate(x, size=self.side, mode=self.mode, align_corners=False, antialias=True).clamp(0, 255)
        return x

    def measure(self, device: torch.device | str) -> None:
        """Set `num_features` by trying two images."""
        with torch.no_grad():
            self.num_features = self(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]


class TorchScriptFeatures(ResizedFeatures):
    """FID's Inception as a TorchScript file: (B, 3, 299, 299) in [-1, 1] to (B, 2048), images resized bilinearly, antialiased.

    NVIDIA's file, told by its `return_features` argument, takes values in 0..255 of any size and resizes by itself.
    """

    def __init__(self, path: str, device: torch.device | str):
        super().__init__((INCEPTION_SIDE, INCEPTION_SIDE), "bilinear")
        self.network = torch.jit.load(path, map_location=device).eval()
        arguments = [argument.name for argument in self.network.forward.schema.arguments]
        self.resizes_itself = "return_features" in arguments
        preprocessing = (
            "its own" if self.resizes_itself else f"bilinear to {INCEPTION_SIDE}x{INCEPTION_SIDE}, antialiased"
        )
        self.about = {"kind": "TorchScript", "resizing": preprocessing}
        self.measure(device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        if self.resizes_itself:
            features = self.network(images.expand(-1, 3, -1, -1), return_features=True)
        else:
            features = self.network(self.resized(images) / 127.5 - 1)
        if isinstance(features, (tuple, list)):
            features = features[0]
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"the file returns a tensor of shape {tuple(features.shape)} for {len(images)} images")
        return features.float()


class TransformersFeatures(ResizedFeatures):
    """An image model of transformers: its pooled output, else the mean of its last hidden state.

    The latter too where the files lack its pooler, as those of many classifiers do: transformers would draw it at random, anew each time.
    Whole images are resized, bicubic and antialiased, to the size that its image processor crops to, and get that processor's
    mean and standard deviation.
    """

    def __init__(self, name: str):
        from transformers import AutoModel

        processing = image_processing(name)
        super().__init__(processing.side, "bicubic")
        self.network, lacking = load_pretrained(AutoModel, name)
        self.has_pooler = all(key.startswith("text_") for key in lacking)
        self.register_buffer("mean", processing.mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", processing.std.reshape(1, 3, 1, 1), persistent=False)
        self.about = {
            "kind": f"transformers {type(self.network).__name__}",
            "resizing": f"bicubic to {self.side[0]}x{self.side[1]}, antialiased",
        }
        self.network.eval()
        self.measure("cpu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        x = (self.resized(images) - self.mean) / self.std
        # Models of images and texts, CLIP and its kin, have a method for the image half.
        encode = getattr(self.network, "get_image_features", self.network)
        output = encode(pixel_values=x)
        if isinstance(output, torch.Tensor):
            return output.flatten(1).float()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None or not self.has_pooler:
            hidden = output.last_hidden_state
            pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return pooled.flatten(1).float()


def load_pretrained(model_class: type, name: str, unused: str = "pooler", **options) -> tuple[nn.Module, list[str]]:
    """`model_class.from_pretrained(name)` in float32, and those weights that its files lack, so that they are random numbers.

    Raises UserError if they lack others than those in whose names `unused`, a regular expression, is found.
    """
    from transformers.utils import logging

    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True, **options}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports heads, which are not used; what is missing is checked here
    try:
        network, info = model_class.from_pretrained(name, **options)
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted(info["missing_keys"])
    needed = [key for key in lacking if not re.search(unused, key)]
    if needed:
        raise UserError(f"its files lack {len(needed)} of the weights, such as {needed[0]}")
    return network, lacking


@dataclass
class ImageProcessing:
    """What an image processor of transformers does.

    Args:
        side: height and width in pixels of what the network sees.
        mean, std: of the pixels, in 0..255, shape (3,), that it subtracts and divides by.
    """

    side: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor


def image_processing(name: str) -> ImageProcessing:
    """Of the folder or Hub id `name`. Raises OSError if it has no image processor, UserError if that swaps colours.

    Its file is read, the processor itself is not built: that may need torchvision.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    if processor.get("do_flip_channel_order"):
        raise UserError("its image processor gives it colours in the order blue, green, red, which is not done here")
    crop = processor.get("do_center_crop", False) and processor.get("crop_size")
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    values = {"image_mean": 0.0, "image_std": 1.0}
    if processor.get("do_normalize", True):
        values = {key: processor.get(key, neutral) for key, neutral in values.items()}
    mean, std = (torch.tensor(value, dtype=torch.float32).expand(3) / factor for value in values.values())
    return ImageProcessing(_height_width(crop or processor["size"]), mean, std)


def _height_width(size: int | dict) -> tuple[int, int]:
    """An image processor's `size` or `crop_size` as (height, width)."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (size["height"], size["width"]) if side is None else (side, side)
    return (size, size) if isinstance(size, int) else tuple(size)


# Training -----------------------------------------------------------------------------------------------------------


@dataclass
class FeatureConfig(DataOptions):
    """Train a small classifier, on the CPU, whose features `training.evaluate` compares."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    output_dir: str = option("runs/features", "Folder of the result; a former result is replaced.")
    label_column: str | None = option("label", "Column that holds the class of each image.")
    num_features: int = option(64, "Width of the last layer's input.")
    num_epochs: int = option(40, "Passes over the training images.")
    batch_size: int = option(64, "Images per step.")
    learning_rate: float = option(4e-3, "Peak learning rate, of AdamW with a one-cycle schedule.")
    weight_decay: float = option(0.05, "Weight decay.")
    label_smoothing: float = option(0.1, "Share of the target that is spread over all classes.")
    max_shift: int = option(1, "Training images are moved by up to so many pixels in each direction.")
    held_out: float = option(0.2, "Share of the images, in (0, 1), kept for measuring the accuracy.")
    seed: int = option(0, "Seed of the split, the weights and the order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_epochs", "batch_size", "learning_rate")
        self.check_not_negative("weight_decay", "max_shift", "seed")
        self.check(self.num_features >= 2 and self.num_features % 2 == 0, "num_features", "even and positive")
        self.check(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        self.check(0 < self.held_out < 1, "held_out", "in (0, 1)")
        self.check(self.label_column is not None, "label_column", "a column of classes")
        self.check_folder("output_dir")


def split(length: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training images and of those held out: a permutation that the seed fixes, cut in two."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(held_out * length))
    return sorted(order[count:]), sorted(order[:count])


def shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) moved by -most..most pixels both ways; border pixels are repeated."""
    count, _, height, width = images.shape
    x = F.pad(images.float(), [most] * 4, mode="replicate").to(images.dtype)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images classified as labelled, in 0..1."""
    found = [network.classify(batch) for batch in images.split(1000)]
    return (torch.cat(found) == labels).float().mean().item()


def train_network(
    config: FeatureConfig, dataset: ImageDataset, images: torch.Tensor, labels: torch.Tensor
) -> FeatureNetwork:
    """A classifier trained on `images` (uint8, (n, C, H, W)) and `labels` (n,); `config` fixes all random numbers."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    network = FeatureNetwork(dataset.channels, dataset.resolution, dataset.num_classes, config.num_features).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, epochs=config.num_epochs, steps_per_epoch=steps_per_epoch
    )
    for _ in tqdm(range(config.num_epochs), desc="Training", unit="epoch"):
        for index in torch.randperm(len(images), generator=generator).tensor_split(steps_per_epoch):
            batch = shifted(images[index], config.max_shift, generator)
            if config.random_flip:
                flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
                batch = torch.where(flip, batch.flip(-1), batch)
            features = network(batch)
            logits = network.classifier(features)
            loss = F.cross_entropy(logits, labels[index], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(config: FeatureConfig) -> str:
    """Train, measure, save; return the folder."""
    if os.path.isdir(config.output_dir) and os.listdir(config.output_dir):
        if _config_of(Path(config.output_dir)).get("_class_name") != FeatureNetwork.__name__:
            raise UserError(f"--output_dir {config.output_dir} holds something else; choose another folder.")
    dataset = ImageDataset(config)
    train, test = split(len(dataset), config.held_out, config.seed)
    if not train:
        raise UserError(f"--dataset_name {config.dataset_name} has {len(dataset)} images, too few to keep some apart.")
    check_writable(config.output_dir)
    images, labels = dataset[train]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights whatever the number of cores; more do not help a network this small
    try:
        network = train_network(config, dataset, images, labels)
    finally:
        torch.set_num_threads(threads)

    test_images, test_labels = dataset[test]
    measured = {
        "accuracy": round(accuracy(network, test_images, test_labels), 6),
        "train_accuracy": round(accuracy(network, images, labels), 6),
        "num_train_images": len(train),
        "num_held_out_images": len(test),
    }
    save(network, config, measured)
    print(f"Accuracy {measured['accuracy']:.2%} on {len(test)} images held out. Saved {config.output_dir}")
    return config.output_dir


def save(network: FeatureNetwork, config: FeatureConfig, measured: dict) -> None:
    """Write weights, config and README as one folder."""
    options = {name: value for name, value in asdict(config).items() if name not in ("config", "output_dir")}
    description = {"_class_name": FeatureNetwork.__name__, **network.config, **measured, "options": options}
    readme = (
        f"A small classifier of the data set `{config.dataset_name}` whose {network.num_features} features serve to compare "
        "sets of images. Made by\n\n"
        "    python -m training.features --output_dir FOLDER\n\n"
        "with the options in `config.json`. "
        f"Accuracy {measured['accuracy']:.2%} on the {measured['num_held_out_images']} images held out, "
        f"{measured['train_accuracy']:.2%} on the {measured['num_train_images']} it was trained on.\n\n"
        "Use: `python -m training.evaluate --features FOLDER`, or `training.features.load_feature_network(FOLDER)`.\n"
    )
    with atomic_folder(config.output_dir) as draft:
        save_file(
            {name: value.contiguous() for name, value in network.state_dict().items()},
            os.path.join(draft, "model.safetensors"),
        )
        with open(os.path.join(draft, "config.json"), "w") as file:
            json.dump(description, file, indent=2)
            file.write("\n")
        with open(os.path.join(draft, "README.md"), "w") as file:
            file.write(readme)


if __name__ == "__main__":
    run_program(main, FeatureConfig)
