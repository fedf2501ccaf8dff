"""Draw the README's pictures: `python -m training.figures --model assets/digits-ctm --output_dir assets/figures`."""

import math
import os
from dataclasses import dataclass

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import ImageOps

from diffusers_ctm import (
    BlockAverageOperator,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
)
from diffusers_ctm.trajectory import gamma_split, heun_step, karras_sigmas

from .config import Checked, UserError, option, run_program
from .data import digits
from .evaluate import load_model
from .files import atomic_file
from .run import enlarged_grid


TEACHER, STUDENT, TARGET, NOISE = "0.55", "tab:blue", "tab:orange", "tab:red"


@dataclass
class FiguresConfig(Checked):
    """Draw the README's pictures."""

    model: str = option(
        "assets/digits-ctm", "The CTM of the digits whose samples are drawn: a folder or a repository on the Hub."
    )
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


def draw_three_gammas(pipe: CTMPipeline, path: str) -> None:
    """The README's ten lines: the ten digits in four steps at three gammas, from the same noise."""
    images = []
    for gamma in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(0)
        images += pipe(class_labels=list(range(10)), num_inference_steps=4, gamma=gamma, generator=generator).images
    with atomic_file(path) as draft:
        enlarged_grid([ImageOps.expand(image, 1, "white") for image in images], rows=3, columns=10).save(draft)


def draw_editing(pipe: CTMPipeline, path: str) -> None:
    """One digit of each class, what is kept of it, and what the CTM makes of that; eight rows of ten."""
    data = digits()
    first = [data["label"].index(k) for k in range(10)]
    image = torch.stack([torch.from_numpy(np.array(data["image"][i])) for i in first])[:, None] / 255
    edit, repair, inpaint = (
        cls.from_pipe(pipe) for cls in (CTMImg2ImgPipeline, CTMRestorationPipeline, CTMInpaintPipeline)
    )
    for one in (edit, repair, inpaint):
        one.set_progress_bar_config(disable=True)
    lower_half = torch.zeros(8, 8)
    lower_half[4:] = 1
    means = BlockAverageOperator(2)
    coarse = means(2 * image - 1)

    def seeded() -> dict:
        return {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}

    noisy = image + 0.25 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    rows = [
        image,
        torch.where(lower_half == 1, 0.5, image),
        inpaint(image, lower_half, class_labels=list(range(10)), **seeded()).images,
        means.pseudo_inverse(coarse) / 2 + 0.5,
        repair(coarse, means, class_labels=list(range(10)), **seeded()).images,
        noisy.clamp(0, 1),
        edit(noisy, sigma=0.5, add_noise=False, class_labels=list(range(10)), **seeded()).images,
        edit(image, 0.5, num_inference_steps=4, class_labels=[(k + 1) % 10 for k in range(10)], **seeded()).images,
    ]
    images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(torch.cat(rows)))
    with atomic_file(path) as draft:
        tiles = [ImageOps.expand(one, 1, "white") for one in images]
        enlarged_grid(tiles, rows=len(rows), columns=10).save(draft)


def main(config: FiguresConfig) -> None:
    pipe = load_digits_model(config.model)
    draw_how_it_works(os.path.join(config.output_dir, "how_it_works.png"))
    draw_three_gammas(pipe, os.path.join(config.output_dir, "three_gammas.png"))
    draw_editing(pipe, os.path.join(config.output_dir, "editing.png"))
    print(f"Drew {config.output_dir}/how_it_works.png, three_gammas.png and editing.png")


if __name__ == "__main__":
    run_program(main, FiguresConfig)
