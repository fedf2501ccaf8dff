# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Draw the pictures of README and docs: `python -m training.figures --output_dir assets/figures`."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_ctm import (
    BlockAverageOperator,
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    LinearOperator,
    gamma_seed_grid,
    log_likelihood,
    trajectory_strip,
)
from diffusers_ctm.trajectory import gamma_split, heun_step, karras_sigmas

from .cli.errors import UserError
from .cli.files import write_files
from .cli.options import Checked, option, run_program
from .cli.shared_options import TeacherOptions
from .data.sources import digits
from .frozen.vectors import load_feature_network
from .networks.pipelines import load_heun, load_model, without_classes
from .report.pictures import captioned, png, tiles
from .report.plots import new_figure


TEACHER, STUDENT, TARGET, NOISE = "0.55", "tab:blue", "tab:orange", "tab:red"


@dataclass
class FiguresConfig(Checked):
    """Draw the pictures of README and docs."""

    model: str = option(
        "assets/digits-ctm", "The CTM of the digits whose samples are drawn: a folder or a repository on the Hub."
    )
    mnist_model: str = option("assets/mnist-ctm", "The CTM of MNIST, likewise.")
    mnist_teacher: str = option("assets/mnist-edm", "The diffusion model that it was distilled from.")
    emoji_model: str = option("assets/emoji-ctm", "The CTM of 64x64 emoji, likewise.")
    emoji_teacher: str = option("assets/emoji-edm", "The diffusion model that it was distilled from.")
    output_dir: str = option("assets/figures", "Folder for the pictures.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")


# The toy problem ------------------------------------------------------------------------------------------------------


def two_modes_denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """D(x, sigma) for one number that is -1 or 1, each with standard deviation 0.1."""
    means = torch.tensor([-1.0, 1.0], dtype=x.dtype)
    variance = 0.01 + sigma[..., None] ** 2
    posterior = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), dim=-1)
    return (posterior * (means + (x[..., None] - means) * 0.01 / variance)).sum(-1)


def flow(x: torch.Tensor, t: float, s: float, steps: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, shape (steps + 1,), and states, (steps + 1, *x.shape), of the ODE from (x, t) down to s."""
    levels = torch.exp(torch.linspace(math.log(t), math.log(s), steps + 1, dtype=torch.float64))
    states = [x]
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        states.append(heun_step(two_modes_denoiser, states[-1], now.expand_as(x), after.expand_as(x)))
    return levels, torch.stack(states)


def exact_jump(x: float, t: float, s: float) -> float:
    """The state at level s of the flow through (x, t)."""
    return flow(torch.tensor(x, dtype=torch.float64), t, s)[1][-1].item()


LOW, HIGH = 0.02, 4.0  # levels


def draw_how_it_works():
    """The loss and the sampler on the exact flow of a toy problem, time against state."""
    figure, axes = new_figure(13, 3.4, columns=4, dpi=110, sharey=True, width_ratios=[1.35, 1, 1, 1])
    for axis in axes:
        for start in np.linspace(-5.5, 5.5, 14):
            axis.plot(*flow(torch.tensor(start), HIGH, LOW), color="0.88", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlim=(HIGH * 1.15, LOW * 0.8), ylim=(-6, 6), xlabel="noise level")
    axes[0].set_ylabel("state")
    draw_loss(axes[0])
    generator, kinds = seeded(7), {0.0: "the ODE", 0.5: "some noise", 1.0: "consistency"}
    for axis, (gamma, kind) in zip(axes[1:], kinds.items(), strict=True):
        draw_sampler(axis, gamma, generator)
        axis.set_title(rf"Sampling, $\gamma$ = {gamma:g}: {kind}", fontsize=10)
    axes[3].plot([], [], color=STUDENT, label="jump")
    axes[3].plot([], [], color=NOISE, linestyle=":", label="added noise")
    axes[3].legend(loc="lower left", frameon=False)
    return figure


def arrow(axis, start: tuple[float, float], end: tuple[float, float], color: str, **style) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 2, "shrinkB": 2, **style}
    axis.annotate("", end, start, arrowprops=style)


def draw_loss(axis) -> None:
    """Two ways from x_t to level s, compared at level 0."""
    t, u, s, x_t = 2.6, 0.95, 0.3, 3.4
    x_u = exact_jump(x_t, t, u)
    x_s_target = exact_jump(x_u, u, s)
    x_s = x_s_target + 0.75  # a student that has still to learn
    estimate, target = exact_jump(x_s, s, LOW) + 0.75, exact_jump(x_s_target, s, LOW)
    axis.plot(*flow(torch.tensor(x_t, dtype=torch.float64), t, u), color=TEACHER, linewidth=2.2)
    arrow(axis, (t, x_t), (s, x_s), STUDENT, connectionstyle="arc3,rad=-0.25")
    arrow(axis, (u, x_u), (s, x_s_target), TARGET, connectionstyle="arc3,rad=0.25")
    for start, end in ((x_s, estimate), (x_s_target, target)):
        arrow(axis, (s, start), (LOW, end), TARGET, linestyle="--")
    for level, state, name, offset in ((t, x_t, "$x_t$", 0.5), (u, x_u, "$x_u$", -1.0), (s, x_s, "$x_s$", 0.5)):
        axis.plot(level, state, "o", color="black", markersize=4)
        axis.text(level, state + offset, name, ha="center")
    for level, state, word, color, side, edge in (
        (1.55, x_u - 0.35, "teacher", "0.35", "right", "top"),
        (0.8, 4.0, "student", STUDENT, "center", "baseline"),
        (0.42, x_s_target - 1.1, "average", TARGET, "center", "top"),
        (LOW * 1.15, (estimate + target) / 2 + 1.2, "distance", "black", "right", "bottom"),
    ):
        axis.text(level, state, word, color=color, ha=side, va=edge)
    axis.set_title("Training: both ways must agree", fontsize=10)


def draw_sampler(axis, gamma: float, generator: torch.Generator) -> None:
    """The sampler with the exact jump."""
    levels = karras_sigmas(5, LOW, HIGH, rho=3.0, dtype=torch.float64)
    x = 2.9
    for t, t_next in zip(levels[:-1].tolist(), levels[1:], strict=True):
        s, noise_std = (value.item() for value in gamma_split(t_next, gamma, LOW))
        x_s = exact_jump(x, t, s)
        arrow(axis, (t, x), (s, x_s), STUDENT)
        x = x_s + noise_std * torch.randn(1, generator=generator, dtype=torch.float64).item()
        if noise_std > 0:
            arrow(axis, (s, x_s), (t_next, x), NOISE, linestyle=":")


# Parts of the pictures of samples -------------------------------------------------------------------------------------

DIGITS = list(range(10))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: CTMPipeline, classes: list[int], *inputs, seed: int = 0, **options) -> torch.Tensor:
    """Images in [0, 1] of these classes; `inputs` are what the pipeline of a further task begins with."""
    return pipe(*inputs, class_labels=classes, generator=seeded(seed), output_type="pt", **options).images


def strips(*columns: dict[str, torch.Tensor]) -> Image.Image:
    """Rows of images, each under its caption: a column of such rows for each dictionary."""
    pictures = [[(caption, tiles(row, len(row))) for caption, row in column.items()] for column in columns]
    return captioned(list(zip(*pictures, strict=True)), gap=6)


def in_palette(picture: Image.Image) -> Image.Image:
    """`picture` in 256 colors, as a file a third as large."""
    return picture.quantize(256, dither=Image.Dither.NONE)


def silent(cls: type, pipe: CTMPipeline) -> CTMPipeline:
    """`pipe` as a pipeline of another class, without progress bars."""
    pipe = cls.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digit_of_each_class(number: int = 0) -> torch.Tensor:
    """The first image of each class in the data, or with `number` = 1, 2, ... a later one; (10, 1, 8, 8) in [0, 1]."""
    data = digits()
    labels = np.array(data["label"])
    indices = [int(np.flatnonzero(labels == k)[number]) for k in DIGITS]
    return torch.stack([torch.from_numpy(np.array(data["image"][i])) for i in indices])[:, None] / 255


class RandomSums(LinearOperator):
    """`count` sums of the pixels of 8x8 images with random weights: a linear operator of no particular structure."""

    def __init__(self, count: int):
        self.matrix = torch.randn(count, 64, generator=seeded())
        self.inverse = torch.linalg.pinv(self.matrix)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.matrix.T

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return (y @ self.inverse.T).reshape(-1, 1, 8, 8)


def strokes(size: int) -> torch.Tensor:
    """Nine drawings in a few flat strokes, one for each group of emoji, shape (9, 3, size, size), in [0, 1]."""
    disk, bar = "ellipse", "rectangle"
    shapes = [  # boxes in sixteenths of the side: left, top, right, bottom
        [(disk, (1, 1, 15, 15), "#fc4"), (bar, (4, 5, 6, 8), "#642"), (bar, (10, 5, 12, 8), "#642")],
        [(disk, (4, 2, 12, 11), "#fc8"), (bar, (4, 1, 12, 5), "#642"), (bar, (2, 11, 14, 16), "#48c")],
        [(disk, (2, 4, 14, 15), "#a63"), (disk, (1, 1, 6, 7), "#a63"), (disk, (10, 1, 15, 7), "#a63")],
        [(disk, (2, 4, 14, 15), "#d23"), (bar, (7, 0, 9, 5), "#4a3")],
        [(bar, (1, 5, 15, 12), "#36b"), (disk, (2, 9, 6, 15), "#333"), (disk, (10, 9, 14, 15), "#333")],
        [(disk, (1, 1, 15, 15), "#f90"), (bar, (1, 7, 15, 9), "#333")],
        [(bar, (3, 1, 13, 15), "#889"), (bar, (5, 3, 11, 10), "#cde")],
        [(bar, (0, 0, 16, 16), "#39d"), (disk, (4, 4, 12, 12), "#fff")],
        [(bar, (0, 3, 16, 7), "#d22"), (bar, (0, 10, 16, 13), "#26b")],
    ]  # fmt: skip
    drawings = []
    for parts in shapes:
        drawing = Image.new("RGB", (size, size), "white")
        for shape, box, color in parts:
            left, top, right, bottom = (round(edge * size / 16) for edge in box)
            getattr(ImageDraw.Draw(drawing), shape)((left, top, right - 1, bottom - 1), fill=color)
        drawings.append(torch.from_numpy(np.array(drawing)).permute(2, 0, 1) / 255)
    return torch.stack(drawings)


# Pictures of digits ---------------------------------------------------------------------------------------------------


def draw_three_gammas(pipe: CTMPipeline) -> Image.Image:
    """README's ten lines: the ten digits in four steps at three gammas, from the same noise."""
    rows = [sample(pipe, DIGITS, num_inference_steps=4, gamma=gamma) for gamma in (0.0, 0.5, 1.0)]
    return tiles(torch.cat(rows), 10)


def draw_editing(pipe: CTMPipeline) -> Image.Image:
    """One digit of each class, the part of it that is kept, and what the CTM makes of that; ten rows of ten."""
    image = digit_of_each_class()
    edit, repair = silent(CTMImg2ImgPipeline, pipe), silent(CTMRestorationPipeline, pipe)
    lower_half = torch.zeros(8, 8)
    lower_half[4:] = 1
    noisy = image + 0.25 * torch.randn(image.shape, generator=seeded())
    rows = [
        image,
        torch.where(lower_half == 1, 0.5, image),
        sample(silent(CTMInpaintPipeline, pipe), DIGITS, image, lower_half),
    ]
    for operator in (BlockAverageOperator(2), RandomSums(24)):
        shown = operator.pseudo_inverse(operator(2 * image - 1)) / 2 + 0.5
        rows += [shown, sample(repair, DIGITS, operator(image), operator)]
    rows += [noisy, sample(edit, DIGITS, noisy, sigma=0.5, add_noise=False)]
    rows.append(sample(edit, [(k + 1) % 10 for k in DIGITS], image, 0.5, num_inference_steps=4))
    return tiles(torch.cat(rows), 10)


def draw_encoding(pipe: CTMPipeline):
    """How exactly images come back from their latents, against steps, and the images between two latents."""
    image, inverter = digit_of_each_class(), silent(CTMInversionPipeline, pipe)
    clean, counts = 2 * image - 1, (2, 4, 8, 18)
    latents = {steps: inverter(image, DIGITS, steps).latents for steps in (*counts, 72)}

    def rms(x: torch.Tensor) -> float:
        return x.square().mean().sqrt().item()

    decoded = {n: inverter.decode(latents[n], DIGITS, n, "latent").images for n in counts}
    jumps = pipe(class_labels=DIGITS, latents=latents[18], output_type="latent").images
    second = digit_of_each_class(1)
    pairs = [(image[k], second[k], k) for k in (0, 2)] + [(image[i], image[j], [i, j]) for i, j in ((1, 7), (4, 9))]
    between = [inverter.interpolate(*ends, torch.linspace(0, 1, 9), k, output_type="pt").images for *ends, k in pairs]

    figure, (left, right) = new_figure(9.6, 3.4, columns=2, dpi=110, width_ratios=[1, 1.25])
    left.loglog(counts, [rms(latents[n] - latents[72]) for n in counts], "o-", label="latents, against 72 steps")
    left.loglog(counts, [rms(decoded[n] - clean) for n in counts], "s-", label="image, encoded and decoded")
    left.axhline(rms(jumps - clean), color=NOISE, linestyle=":", label="image, encoded in 18, decoded in 1 jump")
    left.set_xticks(counts, [str(n) for n in counts])
    left.minorticks_off()
    left.set(xlabel="Heun steps N (2N evaluations each way)", ylabel="RMS error")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    right.imshow(np.asarray(tiles(torch.cat(between), 9)))
    right.set_axis_off()
    right.set_title("spherical interpolation of latents, 18 steps", fontsize=10)
    return figure


def draw_guidance(pipe: CTMPipeline) -> Image.Image:
    """A classifier asks a network that is told no class for the ten classes, at growing scale."""
    network = load_feature_network("digits")
    unconditional, options = without_classes(pipe)
    options |= {"num_inference_steps": 8, "gamma": 1.0, "output_type": "pt"}
    rows = {}
    for scale in (0.0, 1.0, 3.0, 10.0, 30.0):
        guidance = ClassifierGuidance(network.logits, torch.arange(10), scale)
        rows[f"scale {scale:g}"] = unconditional(10, generator=seeded(), guidance=guidance, **options).images
    return strips(rows)


def draw_trajectories(pipe: CTMPipeline) -> Image.Image:
    """States of a run and their jumps to the end at two gammas; one latent at three gammas with ten seeds' noise."""
    rows = {}
    for gamma in (0.0, 1.0):
        strip = trajectory_strip(pipe, 9, gamma, class_labels=5, generator=seeded(3), output_type="pt")
        rows[f"gamma {gamma:g}: states"] = torch.cat(strip.states)
        rows[f"gamma {gamma:g}: their jumps to the end"] = torch.cat(strip.estimates)
    gammas = (0.0, 0.5, 1.0)
    grid = gamma_seed_grid(pipe, gammas, range(10), class_labels=5, generator=seeded(3), output_type="pt")
    return strips(rows | {f"one latent, gamma {gamma:g}: ten seeds": images for gamma, images in zip(gammas, grid)})


def draw_likelihood(pipe: CTMPipeline) -> Image.Image:
    """Bits per dimension of ten digits, and of images that are no longer these digits."""
    image, labels = digit_of_each_class(), torch.arange(10)
    shuffled = image.flatten(1)[:, torch.randperm(64, generator=seeded())].reshape(image.shape)
    kinds = {
        "digits": (image, labels),
        "another class is stated": (image, (labels + 1) % 10),
        "upside down": (image.flip(2), labels),
        "with noise of 0.2": (image + 0.1 * torch.randn(image.shape, generator=seeded()), labels),
        "pixels shuffled": (shuffled, labels),
    }
    images = torch.cat([(one.clamp(0, 1) * 255).round() / 255 for one, _ in kinds.values()])
    classes = torch.cat([labels for _, labels in kinds.values()])
    bits = log_likelihood(pipe, images, classes, rtol=1e-3, atol=1e-3, generator=seeded()).bits_per_dim
    captions = [f"{name}: {ten.mean():.1f} bits/dim" for name, ten in zip(kinds, bits.split(10), strict=True)]
    return strips(dict(zip(captions, images.split(10), strict=True)))


def draw_safety(pipe: CTMPipeline) -> Image.Image:
    """Ten digits without a safety checker, and with one that flags the images that a classifier takes for a 7."""
    network = load_feature_network("digits")

    def no_sevens(images: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        gray = torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2)
        return images, (network.logits(2 * gray - 1).argmax(1) == 7).tolist()

    checked = silent(CTMPipeline, pipe)
    checked.safety_checker = no_sevens
    classes = [3, 7, 1, 7, 5, 0, 7, 8, 2, 9]
    output = checked(class_labels=classes, generator=seeded(), output_type="pt")
    flags = ", ".join(str(flag) for flag in output.nsfw_content_detected)
    return strips({"no safety checker": sample(pipe, classes), flags: output.images})


# Pictures of MNIST and emoji ------------------------------------------------------------------------------------------


def draw_beside_teacher(pipe: CTMPipeline, teacher: CTMPipeline, of_each: int) -> Image.Image:
    """`of_each` images of each class in one and in four steps, and of the teacher, from the same noise."""
    classes = [label for _ in range(of_each) for label in range(pipe.num_classes)]
    rows = {
        "one step: 1 network evaluation": sample(pipe, classes, num_inference_steps=1),
        "four steps: 4 network evaluations": sample(pipe, classes, num_inference_steps=4),
        "the teacher, 18 Heun steps: 35 network evaluations": sample(teacher, classes, num_inference_steps=18),
    }
    return captioned([[(caption, tiles(images, pipe.num_classes))] for caption, images in rows.items()], gap=6)


def draw_emoji_editing(pipe: CTMPipeline) -> Image.Image:
    """Left: samples, a half of each and two completions of it. Right: strokes, and images made of them."""
    complete, edit = silent(CTMInpaintPipeline, pipe), silent(CTMImg2ImgPipeline, pipe)
    classes, (height, width) = list(range(pipe.num_classes)), pipe.image_size
    image = sample(pipe, classes, seed=1, num_inference_steps=18, gamma=0.0)
    lower_half = torch.zeros(height, width)
    lower_half[height // 2 :] = 1
    left = {"samples in 18 steps": image, "their upper half": torch.where(lower_half == 1, 0.5, image)}
    for seed, name in enumerate(("completed, 18 evaluations", "completed, from other noise")):
        left[name] = sample(complete, classes, image, lower_half, seed=seed)
    drawn = strokes(height)[[k % 9 for k in classes]]
    right = {"strokes": drawn}
    for strength in (0.3, 0.4, 0.5):
        right[f"strength {strength:g}, 4 evaluations"] = sample(edit, classes, drawn, strength, num_inference_steps=4)
    return in_palette(strips(left, right))


def draw_emoji_guidance(pipe: CTMPipeline) -> Image.Image:
    """One of each class from the same noise at growing scale of classifier-free guidance, in one step and in four."""

    def column(steps: int) -> dict[str, torch.Tensor]:
        options = {"classes": list(range(pipe.num_classes)), "num_inference_steps": steps, "gamma": 0.0}
        scales = (1.0, 1.5, 2.0, 3.0)
        return {f"steps: {steps}, guidance_scale {s:g}": sample(pipe, guidance_scale=s, **options) for s in scales}

    return in_palette(strips(column(1), column(4)))


DIGITS_PICTURES = {
    "three_gammas": draw_three_gammas,
    "editing": draw_editing,
    "encoding": draw_encoding,
    "guidance": draw_guidance,
    "trajectories": draw_trajectories,
    "likelihood": draw_likelihood,
    "safety": draw_safety,
}

EMOJI_PICTURES = {"emoji_editing": draw_emoji_editing, "emoji_guidance": draw_emoji_guidance}


def shown_shape(pipe: CTMPipeline) -> tuple:
    """Channels, size and number of classes of its images."""
    return pipe.image_channels, pipe.image_size, pipe.num_classes


def main(config: FiguresConfig) -> None:
    """Draw the pictures, each into its file."""
    pipe, mnist, emoji = (load_model(name, ()) for name in (config.model, config.mnist_model, config.emoji_model))
    mnist_teacher, emoji_teacher = (
        load_heun(TeacherOptions(teacher=name)) for name in (config.mnist_teacher, config.emoji_teacher)
    )
    if shown_shape(pipe) != (1, (8, 8), 10):
        raise UserError(f"--model {config.model} must be a CTM of the ten 8x8 digits: the pictures show them.")
    if mnist.num_classes != 10 or shown_shape(mnist_teacher) != shown_shape(mnist):
        raise UserError(
            f"--mnist_model {config.mnist_model} must be a CTM of ten digits, and --mnist_teacher "
            f"{config.mnist_teacher} a diffusion model of the same: the picture shows them."
        )
    if emoji.image_channels != 3 or not emoji.knows_no_class or shown_shape(emoji_teacher) != shown_shape(emoji):
        raise UserError(
            f"--emoji_model {config.emoji_model} must be a CTM of color images in classes, trained with "
            f"--label_dropout, and --emoji_teacher {config.emoji_teacher} a diffusion model of the same: the pictures "
            "show them."
        )
    files = {"how_it_works.png": png(draw_how_it_works())}
    for model in (pipe, mnist, mnist_teacher, emoji, emoji_teacher):
        model.set_progress_bar_config(disable=True)
    files["mnist.png"] = png(draw_beside_teacher(mnist, mnist_teacher, 1))
    files["emoji.png"] = png(in_palette(draw_beside_teacher(emoji, emoji_teacher, 2)))
    for model, pictures in ((pipe, DIGITS_PICTURES), (emoji, EMOJI_PICTURES)):
        files |= {f"{name}.png": png(draw(model)) for name, draw in pictures.items()}
    write_files(config.output_dir, files)
    print(f"Drew {', '.join(files)} in {config.output_dir}")


if __name__ == "__main__":
    run_program(main, FiguresConfig)
