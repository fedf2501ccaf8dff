"""Draw the README's pictures: `python -m training.figures --model assets/digits-ctm --output_dir assets/figures`."""

import math
import os
from dataclasses import dataclass

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from diffusers_ctm import (
    BlockAverageOperator,
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    GrayscaleOperator,
    LinearOperator,
    gamma_seed_grid,
    log_likelihood,
    trajectory_strip,
)
from diffusers_ctm.trajectory import gamma_split, heun_step, karras_sigmas

from .cli.errors import UserError
from .cli.files import atomic_file
from .cli.options import Checked, option, run_program
from .data.sources import digits
from .frozen.vectors import load_feature_network
from .networks.pipelines import load_model, without_classes
from .report.pictures import captioned, enlarged_grid, tiles


matplotlib.use("Agg")


TEACHER, STUDENT, TARGET, NOISE = "0.55", "tab:blue", "tab:orange", "tab:red"


@dataclass
class FiguresConfig(Checked):
    """Draw the README's pictures."""

    model: str = option(
        "assets/digits-ctm", "The CTM of the digits whose samples are drawn: a folder or a repository on the Hub."
    )
    emoji_model: str = option("assets/emoji-ctm", "The CTM of 16x16 emoji, likewise.")
    output_dir: str = option("assets/figures", "Folder for the pictures.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_folder("output_dir")


def two_modes_denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """D(x, sigma) for one number that is -1 or 1, each with standard deviation 0.1."""
    means = torch.tensor([-1.0, 1.0], dtype=x.dtype)
    variance = 0.01 + sigma[..., None] ** 2
    posterior = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), dim=-1)
    return (posterior * (means + (x[..., None] - means) * 0.01 / variance)).sum(-1)


def flow(x: torch.Tensor, t: float, s: float, steps: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and states of the probability-flow ODE from (x, t) down to s, shapes (steps + 1,) and (steps + 1, *x.shape)."""
    levels = torch.exp(torch.linspace(math.log(t), math.log(s), steps + 1, dtype=torch.float64))
    states = [x]
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        states.append(heun_step(two_modes_denoiser, states[-1], now.expand_as(x), after.expand_as(x)))
    return levels, torch.stack(states)


def draw_how_it_works(path: str) -> None:
    """The loss and the sampler on the exact flow of a toy problem, time against state."""
    low, high = 0.02, 4.0
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.4), sharey=True, width_ratios=[1.35, 1, 1, 1], layout="constrained"
    )

    def background(axis):
        for start in np.linspace(-5.5, 5.5, 14):
            levels, states = flow(torch.tensor([start], dtype=torch.float64), high, low)
            axis.plot(levels, states, color="0.88", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xlim(high * 1.15, low * 0.8)
        axis.set_ylim(-6, 6)
        axis.set_xlabel("noise level")

    def arrow(axis, start, end, color, **style):
        properties = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 2, "shrinkB": 2, **style}
        axis.annotate("", end, start, arrowprops=properties)

    # The loss: two ways from x_t to level s, compared at level 0.
    axis = axes[0]
    background(axis)
    t, u, s = 2.6, 0.95, 0.3
    x_t = torch.tensor([3.4], dtype=torch.float64)
    solver_levels, solver_states = flow(x_t, t, u)
    x_u = solver_states[-1].item()
    x_s_target = flow(solver_states[-1], u, s)[1][-1].item()
    x_s = x_s_target + 0.75  # a student that has still to learn
    clean = [flow(torch.tensor([x], dtype=torch.float64), s, low)[1][-1].item() for x in (x_s, x_s_target)]
    clean[0] += 0.75
    axis.plot(solver_levels, solver_states, color=TEACHER, linewidth=2.2)
    arrow(axis, (t, x_t.item()), (s, x_s), STUDENT, connectionstyle="arc3,rad=-0.25")
    arrow(axis, (u, x_u), (s, x_s_target), TARGET, connectionstyle="arc3,rad=0.25")
    arrow(axis, (s, x_s), (low, clean[0]), TARGET, linestyle="--")
    arrow(axis, (s, x_s_target), (low, clean[1]), TARGET, linestyle="--")
    for level, state, name, offset in ((t, x_t.item(), "$x_t$", 0.5), (u, x_u, "$x_u$", -1.0), (s, x_s, "$x_s$", 0.5)):
        axis.plot(level, state, "o", color="black", markersize=4)
        axis.text(level, state + offset, name, ha="center")
    axis.text(1.55, x_u - 0.35, "teacher", color="0.35", ha="right", va="top")
    axis.text(0.8, 4.0, "student", color=STUDENT, ha="center")
    axis.text(0.42, x_s_target - 1.1, "average", color=TARGET, ha="center", va="top")
    axis.text(low * 1.15, (clean[0] + clean[1]) / 2 + 1.2, "distance", ha="right", va="bottom")
    axis.set_title("Training: both ways must agree", fontsize=10)
    axis.set_ylabel("state")

    # The sampler at three gammas, with the exact jump.
    generator = torch.Generator().manual_seed(7)
    for axis, gamma in zip(axes[1:], (0.0, 0.5, 1.0), strict=True):
        background(axis)
        levels = karras_sigmas(5, low, high, rho=3.0, dtype=torch.float64)
        x = torch.tensor([2.9], dtype=torch.float64)
        for t, t_next in zip(levels[:-1], levels[1:], strict=True):
            s, noise_std = gamma_split(t_next, gamma, low)
            x_s = flow(x, t.item(), s.item())[1][-1]
            arrow(axis, (t.item(), x.item()), (s.item(), x_s.item()), STUDENT)
            x_next = x_s + noise_std * torch.randn(1, generator=generator, dtype=torch.float64)
            if noise_std > 0:
                arrow(axis, (s.item(), x_s.item()), (t_next.item(), x_next.item()), NOISE, linestyle=":")
            x = x_next
        kind = {0.0: "the ODE", 0.5: "some noise", 1.0: "consistency"}[gamma]
        axis.set_title(rf"Sampling, $\gamma$ = {gamma:g}: {kind}", fontsize=10)
    axes[3].plot([], [], color=STUDENT, label="jump")
    axes[3].plot([], [], color=NOISE, linestyle=":", label="added noise")
    axes[3].legend(loc="lower left", frameon=False)
    with atomic_file(path) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)


def load_digits_model(name: str) -> CTMPipeline:
    """The CTM in the folder or repository `name`; UserError if it does not draw the ten digits."""
    pipe = load_model(name, ())
    config = pipe.unet.config
    if (config.in_channels, config.sample_size, pipe.num_classes) != (1, 8, 10):
        raise UserError(f"--model {name} must be a CTM of the ten 8x8 digits: the pictures show them.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_emoji_model(name: str) -> CTMPipeline:
    """The CTM in the folder or repository `name`; UserError if it does not draw 16x16 colour images of classes or none."""
    pipe = load_model(name, ())
    config = pipe.unet.config
    if (config.in_channels, config.sample_size) != (3, 16) or not pipe.knows_no_class:
        raise UserError(
            f"--emoji_model {name} must be a CTM of 16x16 colour images in classes, trained with --label_dropout: the pictures show them."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_emoji(pipe: CTMPipeline, path: str) -> None:
    """Two of each class from the same noise, in 1, 4 and 18 steps at gamma = 0; three rows."""
    classes = [label for label in range(pipe.num_classes) for _ in range(2)]
    images = []
    for steps in (1, 4, 18):
        generator = torch.Generator().manual_seed(0)
        images += pipe(class_labels=classes, num_inference_steps=steps, gamma=0.0, generator=generator).images
    save(enlarged_grid([ImageOps.expand(image, 1, "white") for image in images], rows=3, columns=len(classes)), path)


def strokes() -> list[Image.Image]:
    """Nine drawings of 16x16 in a few flat strokes each: what somebody paints who wants an emoji of each of its nine groups."""
    shapes = [
        [("ellipse", (1, 1, 14, 14), "#fc4"), ("rectangle", (4, 5, 5, 7), "#642"), ("rectangle", (10, 5, 11, 7), "#642")],
        [("ellipse", (4, 2, 11, 10), "#fc8"), ("rectangle", (4, 1, 11, 4), "#642"), ("rectangle", (2, 11, 13, 15), "#48c")],
        [("ellipse", (2, 4, 13, 14), "#a63"), ("ellipse", (1, 1, 5, 6), "#a63"), ("ellipse", (10, 1, 14, 6), "#a63")],
        [("ellipse", (2, 4, 13, 14), "#d23"), ("rectangle", (7, 0, 8, 4), "#4a3")],
        [("rectangle", (1, 5, 14, 11), "#36b"), ("ellipse", (2, 9, 5, 14), "#333"), ("ellipse", (10, 9, 13, 14), "#333")],
        [("ellipse", (1, 1, 14, 14), "#f90"), ("rectangle", (1, 7, 14, 8), "#333")],
        [("rectangle", (3, 1, 12, 14), "#889"), ("rectangle", (5, 3, 10, 9), "#cde")],
        [("rectangle", (0, 0, 15, 15), "#39d"), ("ellipse", (4, 4, 11, 11), "#fff")],
        [("rectangle", (0, 3, 15, 6), "#d22"), ("rectangle", (0, 10, 15, 12), "#26b")],
    ]  # fmt: skip
    drawings = []
    for parts in shapes:
        drawings.append(Image.new("RGB", (16, 16), "white"))
        brush = ImageDraw.Draw(drawings[-1])
        for shape, box, colour in parts:
            getattr(brush, shape)(box, fill=colour)
    return drawings


def draw_emoji_editing(pipe: CTMPipeline, path: str) -> None:
    """Left: samples, their grey and two colourisations of it. Right: strokes, and what becomes of them at three strengths."""
    repair, edit = silent(CTMRestorationPipeline, pipe), silent(CTMImg2ImgPipeline, pipe)
    classes, grey = list(range(pipe.num_classes)), GrayscaleOperator()
    options = {"class_labels": classes, "output_type": "pt"}

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    image = pipe(num_inference_steps=18, gamma=0.0, generator=seeded(1), **options).images
    known = grey(2 * image - 1)
    left = [("samples in 18 steps", image), ("their grey", (known / 2 + 0.5).expand_as(image))]
    for seed, name in enumerate(("coloured, 18 evaluations", "coloured, from other noise")):
        left.append((name, repair(known, grey, generator=seeded(seed), **options).images))

    drawn = [strokes()[k % 9] for k in classes]
    right = [("strokes", torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in drawn]))]
    for strength in (0.3, 0.4, 0.5):
        images = edit(drawn, strength, num_inference_steps=4, generator=seeded(0), **options).images
        right.append((f"strength {strength:g}, 4 evaluations", images))
    rows = [[(name, tiles(images, len(classes))) for name, images in row] for row in zip(left, right, strict=True)]
    save(captioned(rows, gap=6), path)


def draw_emoji_guidance(pipe: CTMPipeline, path: str) -> None:
    """One of each class from the same noise at growing scale of classifier-free guidance, in one step and in four."""
    classes = list(range(pipe.num_classes))
    rows = []
    for scale in (1.0, 1.5, 2.0, 3.0):
        rows.append([])
        for steps in (1, 4):
            generator = torch.Generator().manual_seed(0)
            images = pipe(
                class_labels=classes,
                num_inference_steps=steps,
                gamma=0.0,
                guidance_scale=scale,
                generator=generator,
                output_type="pt",
            ).images
            rows[-1].append((f"steps: {steps}, guidance_scale {scale:g}", tiles(images, len(classes))))
    save(captioned(rows, gap=6), path)


def draw_three_gammas(pipe: CTMPipeline, path: str) -> None:
    """The README's ten lines: the ten digits in four steps at three gammas, from the same noise."""
    images = []
    for gamma in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(0)
        images += pipe(class_labels=list(range(10)), num_inference_steps=4, gamma=gamma, generator=generator).images
    save(enlarged_grid([ImageOps.expand(image, 1, "white") for image in images], rows=3, columns=10), path)


def digit_of_each_class(number: int = 0) -> torch.Tensor:
    """One image of each class in the data, the first or with `number` = 1, 2, ... a later one, shape (10, 1, 8, 8), in [0, 1]."""
    data = digits()
    labels = np.array(data["label"])
    indices = [int(np.flatnonzero(labels == k)[number]) for k in range(10)]
    return torch.stack([torch.from_numpy(np.array(data["image"][i])) for i in indices])[:, None] / 255


def silent(cls: type, pipe: CTMPipeline) -> CTMPipeline:
    """`pipe` as a pipeline of another class, without progress bars."""
    pipe = cls.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(picture: Image.Image, path: str) -> None:
    with atomic_file(path) as draft:
        picture.save(draft, format="PNG")


class RandomSums(LinearOperator):
    """`count` sums of the pixels of 8x8 images with random weights: a linear operator of no particular structure."""

    def __init__(self, count: int):
        self.matrix = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
        self.inverse = torch.linalg.pinv(self.matrix)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.matrix.T

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return (y @ self.inverse.T).reshape(-1, 1, 8, 8)


def draw_editing(pipe: CTMPipeline, path: str) -> None:
    """One digit of each class, what is kept of it, and what the CTM makes of that; ten rows of ten."""
    image = digit_of_each_class()
    edit, repair, inpaint = (
        silent(cls, pipe) for cls in (CTMImg2ImgPipeline, CTMRestorationPipeline, CTMInpaintPipeline)
    )
    lower_half = torch.zeros(8, 8)
    lower_half[4:] = 1
    means, sums = BlockAverageOperator(2), RandomSums(24)
    coarse, summed = means(2 * image - 1), sums(2 * image - 1)

    def seeded() -> dict:
        return {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}

    noisy = image + 0.25 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    rows = [
        image,
        torch.where(lower_half == 1, 0.5, image),
        inpaint(image, lower_half, class_labels=list(range(10)), **seeded()).images,
        means.pseudo_inverse(coarse) / 2 + 0.5,
        repair(coarse, means, class_labels=list(range(10)), **seeded()).images,
        sums.pseudo_inverse(summed) / 2 + 0.5,
        repair(summed, sums, class_labels=list(range(10)), **seeded()).images,
        noisy,
        edit(noisy, sigma=0.5, add_noise=False, class_labels=list(range(10)), **seeded()).images,
        edit(image, 0.5, num_inference_steps=4, class_labels=[(k + 1) % 10 for k in range(10)], **seeded()).images,
    ]
    save(tiles(torch.cat(rows), 10), path)


def draw_encoding(pipe: CTMPipeline, path: str) -> None:
    """How exactly images come back from their latents, against steps, and what lies between two latents."""
    image, labels = digit_of_each_class(), list(range(10))
    inverter = silent(CTMInversionPipeline, pipe)

    def latents(steps: int) -> torch.Tensor:
        return inverter(image, labels, steps).latents

    def rms(x: torch.Tensor) -> float:
        return x.square().mean().sqrt().item()

    counts, finest = (2, 4, 8, 18), latents(72)
    found = {steps: latents(steps) for steps in counts}
    back = {steps: inverter.decode(x, labels, steps, "latent").images for steps, x in found.items()}
    jumps = pipe(class_labels=labels, latents=found[18], output_type="latent").images
    second = digit_of_each_class(1)
    pairs = [(image[k], second[k], k) for k in (0, 2)] + [(image[i], image[j], [i, j]) for i, j in ((1, 7), (4, 9))]
    between = [
        inverter.interpolate(one, other, torch.linspace(0, 1, 9), classes, output_type="pt").images
        for one, other, classes in pairs
    ]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=[1, 1.25], layout="constrained")
    clean = 2 * image - 1
    left.loglog(counts, [rms(found[n] - finest) for n in counts], "o-", label="latents, against 72 steps")
    left.loglog(counts, [rms(back[n] - clean) for n in counts], "s-", label="image, encoded and decoded")
    left.axhline(rms(jumps - clean), color=NOISE, linestyle=":", label="image, encoded in 18, decoded in 1 jump")
    left.set_xticks(counts, [str(n) for n in counts])
    left.minorticks_off()
    left.set_xlabel("Heun steps N (2N evaluations each way)")
    left.set_ylabel("RMS error")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    right.imshow(np.asarray(tiles(torch.cat(between), 9)))
    right.set_axis_off()
    right.set_title("spherical interpolation of latents, 18 steps", fontsize=10)
    with atomic_file(path) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)


def draw_guidance(pipe: CTMPipeline, path: str) -> None:
    """The ten classes asked of a network that is told none, by a classifier, at growing scale."""
    network = load_feature_network("digits").requires_grad_(False)
    unconditional, options = without_classes(pipe)
    rows = []
    for scale in (0.0, 1.0, 3.0, 10.0, 30.0):
        guidance = ClassifierGuidance(network.logits, torch.arange(10), scale)
        generator = torch.Generator().manual_seed(0)
        images = unconditional(
            10, num_inference_steps=8, gamma=1.0, generator=generator, guidance=guidance, output_type="pt", **options
        ).images
        rows.append([(f"scale {scale:g}", tiles(images, 10))])
    save(captioned(rows, gap=6), path)


def draw_trajectories(pipe: CTMPipeline, path: str) -> None:
    """The states of a run and their jumps to the end, at two gammas; and one latent at three gammas with the noise of ten seeds."""
    rows = []
    for gamma in (0.0, 1.0):
        strip = trajectory_strip(
            pipe, 9, gamma, class_labels=5, generator=torch.Generator().manual_seed(3), output_type="pt"
        )
        for name, images in (("states", strip.states), ("their jumps to the end", strip.estimates)):
            rows.append([(f"gamma {gamma:g}: {name}", tiles(torch.cat(images), 10))])
    generator = torch.Generator().manual_seed(3)
    gammas = (0.0, 0.5, 1.0)
    grid = gamma_seed_grid(pipe, gammas, range(10), class_labels=5, generator=generator, output_type="pt")
    for gamma, images in zip(gammas, grid, strict=True):
        rows.append([(f"one latent, gamma {gamma:g}: ten seeds", tiles(images, 10))])
    save(captioned(rows, gap=6), path)


def draw_likelihood(pipe: CTMPipeline, path: str) -> None:
    """Bits per dimension of ten digits, and of what is no longer that digit."""
    image, labels = digit_of_each_class(), torch.arange(10)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    shuffled = image.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].reshape(image.shape)
    kinds = {
        "digits": (image, labels),
        "their class said wrongly": (image, (labels + 1) % 10),
        "upside down": (image.flip(2), labels),
        "with noise of 0.2": (image + 0.1 * noise, labels),
        "pixels shuffled": (shuffled, labels),
    }
    images = torch.cat([(one.clamp(0, 1) * 255).round() / 255 for one, _ in kinds.values()])
    classes = torch.cat([labels for _, labels in kinds.values()])
    generator = torch.Generator().manual_seed(0)
    bits = log_likelihood(pipe, images, classes, rtol=1e-3, atol=1e-3, generator=generator).bits_per_dim
    rows = [
        [(f"{name}: {own.mean():.1f} bits/dim", tiles(shown, 10))]
        for name, shown, own in zip(kinds, images.split(10), bits.split(10), strict=True)
    ]
    save(captioned(rows, gap=6), path)


def draw_safety(pipe: CTMPipeline, path: str) -> None:
    """Ten digits without a safety checker, and with one that flags what a classifier takes for a 7."""
    network = load_feature_network("digits")

    def no_sevens(images: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        grey = torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2)
        return images, (network.logits(2 * grey - 1).argmax(1) == 7).tolist()

    checked = silent(CTMPipeline, pipe)
    checked.safety_checker = no_sevens
    outputs = [
        one(class_labels=[3, 7, 1, 7, 5, 0, 7, 8, 2, 9], generator=torch.Generator().manual_seed(0), output_type="pt")
        for one in (pipe, checked)
    ]
    flags = ", ".join(str(flag) for flag in outputs[1].nsfw_content_detected)
    names = ("no safety checker", flags)
    save(captioned([[(name, tiles(found.images, 10))] for name, found in zip(names, outputs)], gap=6), path)


PICTURES = {
    "three_gammas": draw_three_gammas,
    "editing": draw_editing,
    "encoding": draw_encoding,
    "guidance": draw_guidance,
    "trajectories": draw_trajectories,
    "likelihood": draw_likelihood,
    "safety": draw_safety,
}

EMOJI_PICTURES = {"emoji": draw_emoji, "emoji_editing": draw_emoji_editing, "emoji_guidance": draw_emoji_guidance}


def main(config: FiguresConfig) -> None:
    pipe, emoji = load_digits_model(config.model), load_emoji_model(config.emoji_model)
    draw_how_it_works(os.path.join(config.output_dir, "how_it_works.png"))
    for model, pictures in ((pipe, PICTURES), (emoji, EMOJI_PICTURES)):
        for name, draw in pictures.items():
            draw(model, os.path.join(config.output_dir, f"{name}.png"))
    print(f"Drew {', '.join(['how_it_works', *PICTURES, *EMOJI_PICTURES])} (.png) in {config.output_dir}")


if __name__ == "__main__":
    run_program(main, FiguresConfig)
