# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Consistency trajectory models in the browser: `python app.py`, then open the address that it prints.

This file describes the page. demo/actions.py has the actions of the tabs, demo/recipes.py the Python that they run and
show, demo/page.py the parts that every tab has.
"""

import argparse
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import torch

from demo import actions, examples
from demo.checkpoints import CHECKPOINTS, ROOT, SMALL, load, shipped
from demo.controls import class_choice, count, drawing, gamma, own_schedule, picture, result, seed, steps
from demo.page import Page
from demo.plots import plots
from demo.uploads import MOST_BYTES
from training.cli.errors import UserError


INTRODUCTION = """# Consistency trajectory models
One network jumps from noise to an image in one step, or gets there in several. **gamma** says what happens between two
steps. At 0 nothing happens: the first noise fixes the path. The larger gamma is, the more of the image dissolves in new
noise and is made again. One step has no between, so take two or more to see it."""


def build() -> gr.Blocks:
    """The page of the checkpoints in `CHECKPOINTS`."""
    with gr.Blocks(title="Consistency trajectory models", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(INTRODUCTION)
        model = gr.Dropdown(list(CHECKPOINTS), label="Checkpoint", visible=len(CHECKPOINTS) > 1)
        with gr.Tabs() as tabs:
            page = Page(model, tabs)
            tabs_of(page)
        page.follow_and_restore()
        gr.api(actions.stop, api_name="stop", api_visibility="undocumented", queue=False)
        gr.HTML('<div id="latency" role="status"></div>')
        for name, checkpoint in CHECKPOINTS.items():
            gr.Markdown(f"{name}: {checkpoint.notice}")
    return blocks


def tabs_of(page: Page) -> None:
    page.tab(
        "Sample",
        "Move a slider: the same noise is sampled again at once.",
        actions.sample,
        lambda: {
            "steps": steps(2),
            "gamma": gamma(0.0),
            "own_schedule": own_schedule("the gamma above"),
            "label": class_choice(every=True),
            "count": count(16),
            "seed": seed(),
        },
        at_once=True,
    )
    page.tab(
        "Trajectory",
        "Every state on the way from noise, and below each the end of its jump.",
        actions.trajectory,
        lambda: {"label": class_choice(), "steps": steps(5, 8), "seed": seed()},
        at_once=True,
        picture=lambda: result("captions"),
    )
    page.tab(
        "Steps and gamma",
        "The same noise at several numbers of steps and gammas, computed in one batch.",
        actions.steps_and_gamma,
        lambda: {"label": class_choice(), "seed": seed()},
        at_once=True,
        picture=lambda: result("captions"),
    )
    page.tab(
        "One step or many",
        "Drag the line. Left: the CTM. Right: its teacher, a diffusion model, in 18 Heun steps from the same noise.",
        actions.compare,
        lambda: {
            "label": class_choice(every=True),
            "steps": steps(1),
            "own_schedule": own_schedule("gamma 0 on the usual levels"),
            "seed": seed(),
            "count": count(9),
        },
        picture=lambda: gr.ImageSlider(
            label="CTM, diffusion model",
            show_label=False,
            format="png",
            interactive=False,
            elem_classes="pixels",
            buttons=["fullscreen"],
        ),
        at_once=True,
        below=plots,
    )
    page.tab(
        "Inpaint",
        "Draw over a part of a picture. That part is painted anew, the rest stays.",
        actions.inpaint,
        lambda: {
            "drawing": drawing("Picture, with the part to repaint drawn over", ["#c83ca0"], 28),
            "label": class_choice(),
            "steps": steps(18),
            "gamma": gamma(1.0),
            "seed": seed(),
            "count": count(8),
        },
        examples=(examples.inpaint_example, ("lower half", "middle", "every other row"), ("drawing", "label")),
    )
    page.tab(
        "Strokes",
        "Draw something. Strength says how much of it dissolves in noise before the model makes an image of it.",
        actions.edit,
        lambda: {
            "drawing": drawing("Drawing", ["#ffffff", "#000000", "#f5c33b", "#c0392b", "#2e7d32", "#1565c0"], 28),
            "label": class_choice(),
            "strength": gr.Slider(
                0.05, 1, 0.5, step=0.05, label="Strength", info="How much noise; at 1 nothing of the drawing is left."
            ),
            "steps": steps(4),
            "gamma": gamma(0.0),
            "seed": seed(),
            "count": count(8),
        },
        examples=(examples.edit_example, ("ring", "bar", "blocks"), ("drawing", "label")),
    )
    page.tab(
        "Between seeds",
        "The way from one noise to another, and the image of each noise on it.",
        actions.interpolate_seeds,
        lambda: {
            "label": class_choice(),
            "first": seed("First seed", 0),
            "second": seed("Last seed", 1),
            "steps": steps(4),
            "count": count(9, least=2),
        },
        at_once=True,
    )
    page.tab(
        "Between pictures",
        "Two pictures are encoded to their noises; the noises between them are decoded again.",
        actions.interpolate_images,
        lambda: {
            "image": picture("First picture"),
            "other_image": picture("Last picture"),
            "label": class_choice("Class of the first"),
            "other_label": class_choice("Class of the last"),
            "count": count(9, least=2),
        },
        examples=(examples.interpolate_example, ("two samples",), ("image", "other_image", "label", "other_label")),
    )
    page.tab(
        "Guide",
        "The model is not told the class; the gradient of a classifier pulls each step towards it. Checkpoints that "
        "were trained with label dropout need no classifier.",
        actions.guide,
        lambda: {
            "label": class_choice(),
            "scale": gr.Slider(0, 20, 10, step=0.5, label="Scale", info="0 is no guidance."),
            "steps": steps(8),
            "gamma": gamma(1.0),
            "seed": seed(),
            "count": count(8, 16),
        },
    )
    page.tab(
        "Likelihood",
        "Bits per dimension of a picture under the model, beside those of images like its training data. Less is "
        "likelier. It takes seconds.",
        actions.likelihood,
        lambda: {"image": picture("Picture"), "label": class_choice(), "seed": seed()},
        examples=(examples.likelihood_example, ("image", "upside down", "noise"), ("image", "label")),
        files=False,
        picture=lambda: result("captions"),
    )


def start(page: gr.Blocks, **options) -> tuple:
    """Serve the page, to this machine alone unless `server_name` says otherwise. No folder is readable through it."""
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)  # requests of all visitors
    return page.launch(
        theme=gr.themes.Default(
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ),
        css_paths=ROOT / "demo" / "page.css",
        head=f"<script>{(ROOT / 'demo' / 'page.js').read_text(encoding='utf-8')}</script>",
        max_file_size=MOST_BYTES,
        max_threads=16,
        state_session_capacity=256,
        footer_links=["api", "settings"],
        ssr_mode=False,
        show_error=True,  # the messages of components; actions have their own
        allowed_paths=[],
        **options,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        private = check_address(options.host, options.port) and not (options.share or options.root_path)
    except OSError as error:
        port = "" if options.port is None else f", port {options.port}"
        sys.exit(f"Cannot listen at {options.host}{port}: {error.strerror}. Give another --port or --host.")
    try:
        for source in [options.model] if options.model else shipped():
            checkpoint = load(source)
            CHECKPOINTS[checkpoint.name] = checkpoint
            if not private and checkpoint.pipe.config.requires_safety_checker and not checkpoint.pipe.safety_checker:
                raise UserError(
                    f"{checkpoint.source} asks for a safety checker and has none. It is shown on this machine only: "
                    "leave out --host, --share and --root_path."
                )
        if not CHECKPOINTS:
            raise UserError("assets/ holds no CTM. Name one: --model user/name-or-folder")
    except UserError as error:
        sys.exit(str(error))
    torch.set_num_threads(options.threads or threads())
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="ctm-page-")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the folder is removed
    try:
        start(
            build(),
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=options.auth,
            root_path=options.root_path,
            mcp_server=options.mcp,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_address(host: str, port: int | None) -> bool:
    """Whether only this machine reaches the address. OSError if nothing can listen there, before loading anything."""
    places = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
    family, kind, _, _, address = places[0]
    with socket.socket(family, kind) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections do not count
        one.bind(address)
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in places)


def threads() -> int:
    """One thread for small networks, on which several only wait for each other."""
    largest = max(sum(p.numel() for p in one.pipe.unet.parameters()) for one in CHECKPOINTS.values())
    return 1 if largest < SMALL else torch.get_num_threads()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Consistency trajectory models in the browser.")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="A CTM: a folder, or user/name on the Hub. Default: those in assets. Code in a checkpoint does not run.",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="Address to listen on. Default: this machine alone. 0.0.0.0 serves everybody who can reach this machine, "
        "without encryption; without --auth everybody there can use its processor.",
    )
    parser.add_argument("--port", type=int, help="Port to listen on. Default: the first free one from 7860.")
    parser.add_argument(
        "--share",
        action="store_true",
        help="Make a public address that is valid for a week. All traffic passes through Gradio's server, and anyone "
        "who knows or guesses the address can use the page. Use it with --auth.",
    )
    parser.add_argument(
        "--auth",
        type=user_and_password,
        metavar="FILE",
        help="Ask for a name and password: a file with one user:password per line. They cross the network unencrypted, "
        "unless a server in front or --share adds https.",
    )
    parser.add_argument(
        "--root_path",
        metavar="PATH",
        default=os.environ.get("GRADIO_ROOT_PATH"),
        help="Where a web server in front shows the page: '/ctm' for https://example.com/ctm, or that whole address.",
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="Also serve every action as a tool of the Model Context Protocol, at /gradio_api/mcp/. An agent with "
        "access can start as much work as a visitor.",
    )
    parser.add_argument(
        "--threads", type=int, help="Processor threads of one request. Default: 1 for networks below 10 M parameters."
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be 1 or more")
    if options.root_path and not options.root_path.startswith(("/", "http://", "https://")):
        parser.error("--root_path must be a path that begins with /, or an address")
    if options.port is not None and not 0 < options.port < 65536:
        parser.error("--port must be 1 to 65535")
    return options


def user_and_password(path: str) -> list[tuple[str, str]]:
    """The pairs in a file of `user:password` lines."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from error
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{path} must hold lines of user:password")
    return pairs


if __name__ == "__main__":
    main()
