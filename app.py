# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Consistency trajectory models in the browser: `python app.py`, then open the address that it prints.

The page is described here; what its tabs do stands in demo/actions.py, the Python that they run and show in demo/recipes.py.
"""

import argparse
import functools
import inspect
import ipaddress
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import pandas as pd
import torch

from demo import actions
from demo.actions import CHECKPOINTS, EVERY_CLASS, MOST_IMAGES, MOST_SEED, MOST_STEPS, MOST_TURN
from demo.checkpoints import SMALL, TURN, Superseded, UnfitCheckpoint, load, shipped
from demo.uploads import CANVAS, MOST_BYTES, Drawing, Picture


logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
WAITING = 64  # requests in the queue, of all visitors
LIVE = {"concurrency_id": "live", "concurrency_limit": 1}  # short and long work in a line of its own each
LONG = {"concurrency_id": "long", "concurrency_limit": 1}
INTRODUCTION = """# Consistency trajectory models
One network jumps from noise to an image in one step, or goes there in several. **gamma** says what happens between two steps: at 0 nothing, the path is
fixed by the first noise; up to 1 more and more of what was reached is dissolved in new noise and made again. In one step there is no between, so take two or more
to see it."""


# Controls -------------------------------------------------------------------------------------------------------------


def first_checkpoint() -> str:
    return next(iter(CHECKPOINTS))


def class_choices(model: str, every: bool) -> dict:
    names = CHECKPOINTS[model].classes
    value = EVERY_CLASS if every or not names else names[min(3, len(names) - 1)]
    return {"choices": [EVERY_CLASS] * every + names, "value": value, "visible": bool(names)}


class ClassChoice(gr.Dropdown):
    """gr.Dropdown that the API does not bind to the classes of the first checkpoint; actions check the class."""

    is_template = True

    def api_info(self) -> dict:
        return {"type": "string"}


def following(make: Callable[..., gr.components.Component], properties: Callable[[str], dict]):
    """What `make` makes with the `properties` of a checkpoint, by name; they change when another one is chosen."""
    field = make(**properties(first_checkpoint()))
    field.properties_for = properties
    return field


def class_choice(label: str = "Class", every: bool = False) -> gr.Dropdown:
    """The class to draw."""
    make = functools.partial(ClassChoice, label=label, allow_custom_value=True)
    return following(make, lambda model: class_choices(model, every))


def own_schedule(instead_of: str) -> gr.Checkbox:
    """Whether to use what `training.tune` found; seen where the checkpoint carries it."""

    def properties(model: str) -> dict:
        steps = [str(number) for number in CHECKPOINTS[model].presets]
        numbers = " and ".join(filter(None, [", ".join(steps[:-1]), *steps[-1:]]))
        info = f"Noise levels and gamma that the checkpoint carries for {numbers} steps, instead of {instead_of}."
        return {"value": False, "visible": bool(steps), "info": info}

    return following(functools.partial(gr.Checkbox, label="Tuned schedule"), properties)


def steps(value: int, most: int = MOST_STEPS) -> gr.Slider:
    return gr.Slider(1, most, value, step=1, label="Steps", info="Network evaluations for each image.")


def gamma(value: float) -> gr.Slider:
    info = "0: the path is fixed. 1: each step forgets where it was. Counts from two steps on."
    return gr.Slider(0, 1, value, step=0.05, label="gamma", info=info)


def seed(label: str = "Seed", value: int = 0) -> gr.Number:
    return gr.Number(
        value, label=label, precision=0, minimum=0, maximum=MOST_SEED, info="The number that the noise is made from."
    )


def count(value: int, most: int = MOST_IMAGES, least: int = 1) -> gr.Slider:
    return gr.Slider(least, most, value, step=1, label="Images")


def seed_buttons(field: gr.Number) -> None:
    """Another seed, and back to the one before."""
    with gr.Row():
        for label, script in (("New seed", "ctmNewSeed"), ("Seed before", "ctmLastSeed")):
            button = gr.Button(label, size="sm", min_width=80)
            button.click(None, field, field, js=f"(seed) => window.{script}(seed)").then(
                None, js="() => window.ctmRun()"
            )


# Tabs -----------------------------------------------------------------------------------------------------------------


def guarded(action: Callable, take: Callable) -> Callable:
    """`action`, of whose result `take` makes what the page shows; what it refuses becomes a message in the page."""

    @functools.wraps(action)
    def call(*arguments):
        try:
            return take(action(*arguments))
        except (gr.Error, Superseded):
            raise
        except (ValueError, ImportError) as error:  # the pipelines' own checks; programs that are not installed
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception("%s failed", action.__name__)
            raise gr.Error("That failed here. The page goes on working; its log says why.") from error

    return call


def in_turn(call: Callable) -> Callable:
    """`call` for the page itself: the last argument is its turn, by which a later movement ends it. What is shown then stays."""

    def run(*arguments):
        token = TURN.set(str(arguments[-1])[:MOST_TURN])
        try:
            return call(*arguments[:-1])
        except Superseded:
            return gr.skip()
        finally:
            TURN.reset(token)

    return run


def as_files(action: Callable) -> Callable:
    """`action` for an endpoint of its own, whose result is a .zip."""
    name = action.__name__
    call = guarded(action, lambda made: actions.zipped(made, name))
    call.__name__ = f"{name}_files"  # what MCP calls it
    call.__doc__ = f"{actions.FILES.format(name=name)}\n\n{action.__doc__}"
    return call


class Page:
    """The tabs, with the controls that a link restores."""

    def __init__(self, model: gr.Dropdown, tabs: gr.Tabs):
        self.model, self.tabs = model, tabs
        self.controls: dict[str, dict[str, gr.components.Component]] = {}
        self.parts: list[gr.Column] = []  # that follow the checkpoint, too

    def tab(
        self,
        title: str,
        about: str,
        action: Callable,
        controls: Callable[[], dict[str, gr.components.Component]],
        picture: Callable[[], gr.components.Component] | None = None,
        at_once: bool = False,
        examples: tuple[Callable, Sequence[str], Sequence[str]] | None = None,
        files: bool = True,
        below: Callable[[], list[gr.Column]] | None = None,
    ) -> None:
        """One tab: `controls` by the names of the action's arguments, and its picture, words, Python, files and link.

        `at_once`: it runs whenever a control moves. `examples`: (function of checkpoint and name, names, which controls it fills).
        """
        name = action.__name__
        with gr.Tab(title, id=name) as tab:
            gr.Markdown(about)
            with gr.Row():
                with gr.Column(scale=2, min_width=300, elem_classes=["live"] * at_once):
                    buttons = self.example_buttons(examples[1] if examples else ())
                    fields = controls()
                    if "seed" in fields:
                        seed_buttons(fields["seed"])
                    run = gr.Button("Run", variant="primary", elem_classes=["run"] + ["at-once"] * at_once)
                    if examples:
                        self.wire_examples(buttons, fields, *examples)
                with gr.Column(scale=3, min_width=300, elem_classes=["first-on-phones"] * at_once):
                    shown = (picture or result)()
                    report = gr.Markdown(elem_classes="report")
            if below is not None:
                self.parts += below()
            with gr.Accordion("Python that makes the same, files, link", open=False):
                code = gr.Code(language="python", label="Python", interactive=False, lines=8, max_lines=24)
                link = gr.Textbox(
                    label="Link to this",
                    info="It holds the settings, not pictures.",
                    buttons=["copy"],
                    interactive=False,
                )
                if files:
                    save = gr.Button("Make a file of the images", size="sm")
                    file = gr.File(label="Images that say how they were made, and the Python")

            fields = {key: fields[key] for key in inspect.signature(action).parameters if key in fields}
            inputs = [self.model, *fields.values()]
            call, outputs = guarded(action, lambda made: (made.picture, made.report, made.code)), [shown, report, code]
            if at_once:
                moves = [field.input for field in fields.values()]
                turn = gr.Textbox(visible=False)
                gr.Button(visible=False).click(
                    call, inputs, outputs, api_name=name, **LIVE
                )  # for the API, without a turn
                gr.on(moves, None, inputs, js=f"(...values) => window.ctmMoved({json.dumps(name)}, values)")
                ran = gr.on(
                    [run.click, *moves],
                    in_turn(call),
                    [*inputs, turn],
                    outputs,
                    js=f"(...values) => window.ctmStarts({json.dumps(name)}, values)",
                    api_visibility="private",
                    trigger_mode="always_last",
                    show_progress="minimal",
                    **LIVE,
                )
            else:
                ran = run.click(call, inputs, outputs, api_name=name, trigger_mode="always_last", **LONG)
            ran.success(None, [self.model, *self.linked(fields).values()], link, js=self.remember(name, fields))
            if files:
                save.click(
                    as_files(action),
                    inputs,
                    file,
                    api_name=f"{name}_files",
                    **LONG,
                )
            if at_once:
                tab.select(None, js="() => window.ctmRunLive()")
        self.controls[name] = fields

    def example_buttons(self, names: Sequence[str]) -> list[gr.Button]:
        if not names:
            return []
        with gr.Row():
            return [gr.Button(f"Example: {name}", size="sm", min_width=80) for name in names]

    def wire_examples(
        self, buttons: list, fields: dict, function: Callable, names: Sequence[str], fills: Sequence[str]
    ) -> None:
        """A press fills the controls and runs. One endpoint serves all: the name of the example is its argument."""
        for button, which in zip(buttons, names, strict=True):
            first = which == names[0]
            button.click(
                guarded(function, lambda found: found),
                [self.model, gr.Textbox(which, visible=False)][: 1 + (len(names) > 1)],
                [fields[name] for name in fills],
                api_name=function.__name__ if first else None,
                api_visibility="public" if first else "private",
                **LIVE,
            ).success(None, js="() => setTimeout(window.ctmRun, 400)")

    def linked(self, fields: dict) -> dict:
        """What a link can hold: no pictures."""
        return {name: field for name, field in fields.items() if not isinstance(field, (Drawing, Picture))}

    def remember(self, name: str, fields: dict) -> str:
        return f"(...values) => window.ctmRemember({json.dumps(name)}, {json.dumps(['model', *self.linked(fields)])}, values)"

    def restore(self, request: gr.Request) -> dict:
        """The settings that the page's address holds; what does not fit is left as it is, with a warning."""
        query, strange = dict(request.query_params), []
        model, name = query.get("model", first_checkpoint()), query.get("tab")
        if model not in CHECKPOINTS:
            strange.append("model")
            model = first_checkpoint()
        found = {self.model: model, **self.follow(model)}
        if name in self.controls:
            found[self.tabs] = gr.Tabs(selected=name)
            for key, field in self.linked(self.controls[name]).items():
                if key not in query:
                    continue
                update = restored(field, query[key], model)
                if update is None:
                    strange.append(key)
                else:
                    found[field] = update
        if strange:
            gr.Warning(f"What the link says of {', '.join(strange)} does not fit this page and was left out.")
        return found

    def followers(self) -> list[gr.components.Component | gr.Column]:
        fields = [one for fields in self.controls.values() for one in fields.values()]
        return [one for one in fields if hasattr(one, "properties_for")] + self.parts

    def follow(self, model: str) -> dict:
        return {field: gr.update(**field.properties_for(model)) for field in self.followers()}

    def restorable(self) -> list:
        fields = [one for fields in self.controls.values() for one in self.linked(fields).values()]
        return [self.model, self.tabs, *fields, *self.parts]


def restored(field: gr.components.Component, text: str, model: str):
    """`text` of a link as an update of `field`; None if it cannot be its value."""
    if hasattr(field, "properties_for"):
        properties = field.properties_for(model)
        if isinstance(field, gr.Dropdown):
            values = {one: one for one in properties["choices"]}
        else:
            values = {"false": False, "true": True} if properties["visible"] else {"false": False}
        return gr.update(**{**properties, "value": values[text]}) if text in values else None
    try:
        value = float(text)
    except ValueError:
        return None
    if not field.minimum <= value <= field.maximum:
        return None
    return value if field.step and field.step < 1 else int(value)


def result(*classes: str) -> gr.Image:
    return gr.Image(
        label="Images",
        show_label=False,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["pixels", *classes],
    )


def with_captions() -> gr.Image:
    return result("captions")


def plots() -> list[gr.Column]:
    """Distance against network evaluations, of the checkpoints that carry an evaluation; that of the chosen one is seen."""
    found = []
    for name, checkpoint in CHECKPOINTS.items():
        if checkpoint.evaluation is None:
            continue
        try:
            table = pd.DataFrame(distances(checkpoint.evaluation))
            features = checkpoint.evaluation["features"]["name"]
        except (KeyError, TypeError, IndexError):  # another program's
            continue
        with following(gr.Column, lambda model, name=name: {"visible": model == name}) as column:
            draw_plot(name, features, table)
        found.append(column)
    return found


def draw_plot(name: str, features: str, table: pd.DataFrame) -> None:
    gr.Markdown(
        f"{name}: Frechet distance to real images on the features `{features}` against network evaluations; lower is better. "
        "The teacher is sampled by Heun's method."
    )
    gr.ScatterPlot(
        table,
        x="evaluations",
        y="distance",
        color="gamma",
        x_title="network evaluations",
        y_title="distance",
        x_lim=[0, 1.1 * table.evaluations.max()],
        y_lim=[0, 1.1 * table.distance.max()],
        height=260,
        buttons=[],
    )


def distances(evaluation: dict) -> list[dict]:
    rows, results = [], [one for one in evaluation["results"] if one["sampler"] in ("ctm", "heun")]
    gammas = sorted({one["gamma"] for one in results if one["gamma"] is not None})
    for one in results:
        if one["sampler"] == "heun":
            names = ["Heun"]
        else:
            names = [f"{gamma:g}" for gamma in (gammas if one["gamma"] is None else [one["gamma"]])]
        rows += [{"evaluations": one["nfe"], "distance": one["frechet"]["mean"], "gamma": name} for name in names]
    return rows


# The page -------------------------------------------------------------------------------------------------------------


def build() -> gr.Blocks:
    """The page of the checkpoints in `CHECKPOINTS`."""
    with gr.Blocks(title="Consistency trajectory models", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        names = list(CHECKPOINTS)
        model = gr.Dropdown(names, value=names[0], label="Checkpoint", visible=len(names) > 1)
        with gr.Tabs() as tabs:
            tabs_of(Page(model, tabs))
        gr.api(actions.stop, api_name="stop", api_visibility="undocumented", queue=False)
        gr.HTML('<div id="latency" role="status"></div>')
        for name, checkpoint in CHECKPOINTS.items():
            gr.Markdown(f"{name}: {checkpoint.notice}")
    return page


def tabs_of(page: Page) -> None:
    def drawing(label: str, colors: list[str], size: int) -> Drawing:
        return Drawing(
            label=label,
            show_label=False,
            type="pil",
            format="png",
            image_mode="RGBA",
            sources=("upload", "clipboard"),
            canvas_size=(CANVAS, CANVAS),
            fixed_canvas=True,
            height=420,
            layers=False,
            transforms=(),
            brush=gr.Brush(default_size=size, colors=colors, color_mode="fixed"),
            buttons=[],
            elem_classes="pixels",
        )

    def picture(label: str) -> Picture:
        return Picture(
            label=label, format="png", sources=["upload", "clipboard"], height=240, elem_classes="pixels", buttons=[]
        )

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
        "On the way from noise: every state, and below it where its jump to the end leads.",
        actions.trajectory,
        lambda: {"label": class_choice(), "steps": steps(5, 8), "seed": seed()},
        at_once=True,
        picture=with_captions,
    )
    page.tab(
        "Steps and gamma",
        "The same noise at several numbers of steps and gammas, computed in one batch.",
        actions.steps_and_gamma,
        lambda: {"label": class_choice(), "seed": seed()},
        at_once=True,
        picture=with_captions,
    )
    page.tab(
        "One step or many",
        "Drag the line: left the CTM, right the diffusion model that it came from, in 18 steps of Heun's method from the same noise.",
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
        "Draw over a part of a picture; it is painted again, the rest stays.",
        actions.inpaint,
        lambda: {
            "drawing": drawing("Picture, with the part to repaint drawn over", ["#c83ca0"], 28),
            "label": class_choice(),
            "steps": steps(18),
            "gamma": gamma(1.0),
            "seed": seed(),
            "count": count(8),
        },
        examples=(actions.inpaint_example, ("lower half", "middle", "every other row"), ("drawing", "label")),
    )
    page.tab(
        "Strokes",
        "Draw, and choose how much of the drawing is dissolved in noise before the model makes an image of it.",
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
        examples=(actions.edit_example, ("ring", "bar", "blocks"), ("drawing", "label")),
    )
    page.tab(
        "Between seeds",
        "From one noise to another, and what becomes of each on the way.",
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
        "Two pictures are led back to their noise, and what lies between is led forward again.",
        actions.interpolate_images,
        lambda: {
            "image": picture("First picture"),
            "other_image": picture("Last picture"),
            "label": class_choice("Class of the first"),
            "other_label": class_choice("Class of the last"),
            "count": count(9, least=2),
        },
        examples=(actions.interpolate_example, ("two samples",), ("image", "other_image", "label", "other_label")),
    )
    page.tab(
        "Guide",
        "The model is not told the class; a classifier's gradient pulls each step towards it. For checkpoints trained with label dropout, guidance needs no classifier.",
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
        "How probable is a picture under the model? In bits per dimension, beside images that belong there; less is likelier. It takes seconds.",
        actions.likelihood,
        lambda: {"image": picture("Picture"), "label": class_choice(), "seed": seed()},
        examples=(actions.likelihood_example, ("image", "upside down", "noise"), ("image", "label")),
        files=False,
        picture=with_captions,
    )

    page.model.input(page.follow, page.model, page.followers(), api_visibility="private", **LIVE).success(
        None, js="() => window.ctmRunLive()"
    )
    blocks = gr.context.Context.root_block
    blocks.load(
        page.restore,
        None,
        page.restorable(),
        api_visibility="private",
        concurrency_limit=None,
    ).then(None, js="() => window.ctmRestored()")


def start(page: gr.Blocks, **options) -> tuple:
    """Serve the page, to this machine alone unless `server_name` says otherwise. No folder is readable through it."""
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return page.launch(
        theme=gr.themes.Default(font=font, font_mono=["ui-monospace", "Consolas", "monospace"]),
        css_paths=HERE / "demo" / "page.css",
        head=f"<script>{(HERE / 'demo' / 'page.js').read_text()}</script>",
        max_file_size=MOST_BYTES,
        max_threads=16,
        state_session_capacity=256,
        footer_links=["api", "settings"],
        ssr_mode=False,
        show_error=True,  # what a component refuses, in words; actions word their own
        allowed_paths=[],
        **options,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        for source in [options.model] if options.model else shipped():
            checkpoint = load(source)
            CHECKPOINTS[checkpoint.name] = checkpoint
        if not CHECKPOINTS:
            raise UnfitCheckpoint("assets/ holds no CTM. Name one: --model user/name-or-folder")
        for checkpoint in CHECKPOINTS.values():
            unchecked = checkpoint.pipe.config.requires_safety_checker and checkpoint.pipe.safety_checker is None
            if unchecked and (options.share or not is_loopback(options.host)):
                raise UnfitCheckpoint(
                    f"{checkpoint.source} asks for a safety checker and has none. It is shown on this machine only: leave out --host and --share."
                )
    except UnfitCheckpoint as error:
        sys.exit(str(error))
    torch.set_num_threads(options.threads or threads())
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="ctm-page-")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the folder goes, too
    try:
        start(
            build(),
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=options.auth,
            mcp_server=options.mcp,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def threads() -> int:
    """One for small networks: on them several only wait for each other."""
    largest = max(sum(p.numel() for p in one.pipe.unet.parameters()) for one in CHECKPOINTS.values())
    return 1 if largest < SMALL else torch.get_num_threads()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
        help="Address to listen on. Default: this machine alone. 0.0.0.0 serves everybody who can reach this machine: without --auth anybody there "
        "uses its processor, unencrypted.",
    )
    parser.add_argument("--port", type=int, help="Port to listen on. Default: the first free one from 7860.")
    parser.add_argument(
        "--share",
        action="store_true",
        help="Make a public address for a week, through a server of Gradio's: what visitors send and see passes through it, and whoever knows or guesses "
        "the address can use the page. Use it with --auth.",
    )
    parser.add_argument(
        "--auth",
        type=user_and_password,
        metavar="FILE",
        help="Ask for a name and password: a file with one user:password per line. They cross the network unencrypted unless a server in front or --share "
        "adds https.",
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="Also serve every action as a tool of the Model Context Protocol, at /gradio_api/mcp/. An agent that may use it can start as much work as "
        "a visitor.",
    )
    parser.add_argument(
        "--threads", type=int, help="Processor threads of one request. Default: 1 for networks below 10 M parameters."
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be 1 or more")
    return options


def user_and_password(path: str) -> list[tuple[str, str]]:
    """The pairs in a file of `user:password` lines."""
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error.strerror}") from error
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{path} must hold lines of user:password")
    return pairs


if __name__ == "__main__":
    main()
