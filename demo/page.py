# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Parts of every tab: controls wired to its action, picture, words, Python, files, and a link that restores it."""

import functools
import inspect
import json
import logging
from collections.abc import Callable, Sequence

import gradio as gr

from . import actions
from .checkpoints import CHECKPOINTS
from .controls import restored, result, seed_buttons
from .turns import Superseded, in_turn
from .uploads import Drawing, Picture


logger = logging.getLogger(__name__)

LIVE = {"concurrency_id": "live", "concurrency_limit": 1}  # short and long work wait in lines of their own

LONG = {"concurrency_id": "long", "concurrency_limit": 1}


def guarded(action: Callable, take: Callable) -> Callable:
    """`action` with its result given to `take`; its errors become messages in the page."""

    @functools.wraps(action)
    def call(*arguments):
        try:
            return take(action(*arguments))
        except (gr.Error, Superseded):
            raise
        except (ValueError, ImportError) as error:  # checks of the pipelines; packages that are not installed
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception("%s failed", action.__name__)
            raise gr.Error("That failed here. The page goes on working; its log says why.") from error

    return call


def as_files(action: Callable) -> Callable:
    """`action` as an endpoint that gives a .zip."""
    name = action.__name__
    call = guarded(action, lambda made: actions.zipped(made, name))
    call.__name__ = f"{name}_files"  # what MCP calls it
    about = f"A .zip of the images of `{name}`, each with its provenance, and of the Python that makes them."
    call.__doc__ = f"{about}\n\n{action.__doc__}"
    return call


class Page:
    """The tabs, with the controls that a link restores."""

    def __init__(self, model: gr.Dropdown, tabs: gr.Tabs):
        self.model, self.tabs = model, tabs
        self.controls: dict[str, dict[str, gr.components.Component]] = {}  # of each tab: those that a link can hold
        self.restorable = [model, tabs]

    def tab(
        self,
        title: str,
        about: str,
        action: Callable,
        controls: Callable[[], dict[str, gr.components.Component]],
        picture: Callable[[], gr.components.Component] = result,
        at_once: bool = False,
        examples: tuple[Callable, Sequence[str], Sequence[str]] | None = None,
        files: bool = True,
        below: Callable[[], list[gr.Column]] = list,
    ) -> None:
        """Add a tab: `controls` by the names of the action's arguments, and its picture, words, Python, files and link.

        `at_once`: it runs whenever a control moves. `examples`: (function, names of the examples, controls to fill).
        """
        name = action.__name__
        fill, names, filled = examples or (None, (), ())
        with gr.Tab(title, id=name) as tab:
            gr.Markdown(about)
            with gr.Row():
                with gr.Column(scale=2, min_width=300, elem_classes=["live"] * at_once):
                    with gr.Row(visible=bool(names)):
                        buttons = [gr.Button(f"Example: {which}", size="sm", min_width=80) for which in names]
                    fields = controls()
                    if "seed" in fields:
                        seed_buttons(fields["seed"])
                    run = gr.Button("Run", variant="primary", elem_classes=["run"] + ["at-once"] * at_once)
                    self.wire_examples(buttons, names, fill, [fields[key] for key in filled])
                with gr.Column(scale=3, min_width=300, elem_classes=["first-on-phones"] * at_once):
                    shown = picture()
                    report = gr.Markdown(elem_classes="report")
            parts = below()
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
            linked = {key: field for key, field in fields.items() if not isinstance(field, (Drawing, Picture))}
            call = guarded(action, lambda made: (made.picture, made.report, made.code))
            outputs = [shown, report, code]
            if at_once:
                moves = [field.input for field in fields.values()]
                for_api = gr.Button(visible=False)  # without a turn
                for_api.click(call, inputs, outputs, api_name=name, **LIVE)
                gr.on(moves, None, inputs, js=f"(...values) => window.ctmMoved({json.dumps(name)}, values)")
                ran = gr.on(
                    [run.click, *moves],
                    in_turn(call),
                    [*inputs, gr.Textbox(visible=False)],
                    outputs,
                    js=f"(...values) => window.ctmStarts({json.dumps(name)}, values)",
                    api_visibility="private",
                    trigger_mode="always_last",
                    show_progress="minimal",
                    **LIVE,
                )
            else:
                ran = run.click(call, inputs, outputs, api_name=name, trigger_mode="always_last", **LONG)
            remember = f"window.ctmRemember({json.dumps(name)}, {json.dumps(['model', *linked])}, values)"
            ran.success(None, [self.model, *linked.values()], link, js=f"(...values) => {remember}")
            if files:
                save.click(as_files(action), inputs, file, api_name=f"{name}_files", **LONG)
            if at_once:
                tab.select(None, js="() => window.ctmRunLive()")
        self.controls[name] = linked
        self.restorable += [*linked.values(), *parts]

    def wire_examples(self, buttons: list, names: Sequence[str], fill: Callable, fields: list) -> None:
        """Let a press fill the controls and run. One endpoint serves all: its argument is the name of the example."""
        for button, which in zip(buttons, names, strict=True):
            first = which == names[0]
            button.click(
                guarded(fill, lambda values: values),
                [self.model, gr.Textbox(which, visible=False)][: 1 + (len(names) > 1)],
                fields,
                api_name=fill.__name__ if first else None,
                api_visibility="public" if first else "private",
                **LIVE,
            ).success(None, js="() => setTimeout(window.ctmRun, 400)")

    def restore(self, request: gr.Request) -> dict:
        """Settings in the address of the page; a setting that does not fit stays as it is, with a warning."""
        query, strange = dict(request.query_params), []
        model, name = query.get("model", self.model.value), query.get("tab")
        if model not in CHECKPOINTS:
            strange.append("model")
            model = self.model.value
        updates = {self.model: model, **self.follow(model)}
        if name in self.controls:
            updates[self.tabs] = gr.Tabs(selected=name)
            given = {key: field for key, field in self.controls[name].items() if key in query}
            found = {field: restored(field, query[key], model) for key, field in given.items()}
            strange += [key for key, field in given.items() if found[field] is None]
            updates |= {field: update for field, update in found.items() if update is not None}
        if strange:
            gr.Warning(f"The link's {', '.join(strange)} does not fit this page and was left out.")
        return updates

    def followers(self) -> list[gr.components.Component | gr.Column]:
        return [one for one in self.restorable if hasattr(one, "properties_for")]

    def follow(self, model: str) -> dict:
        return {field: gr.update(**field.properties_for(model)) for field in self.followers()}

    def follow_and_restore(self) -> None:
        """Let controls follow the chosen checkpoint, and the address restore them. Call it once all tabs are there."""
        self.model.input(self.follow, self.model, self.followers(), api_visibility="private", **LIVE).success(
            None, js="() => window.ctmRunLive()"
        )
        gr.context.Context.root_block.load(
            self.restore, None, self.restorable, api_visibility="private", concurrency_limit=None
        ).then(None, js="() => window.ctmRestored()")
