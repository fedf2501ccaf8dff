# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Saved folders that load with and without this package installed.

With it, `import diffusers_ctm` has registered the classes with diffusers, where `DiffusionPipeline.from_pretrained`
finds them. Without it, diffusers runs code that lies in the folder, if the user trusts it: the package's modules as one
file. It lies beside each component of ours too: diffusers copies the code of all components flat into one place.
"""

import ast
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging

from .files import written_aside


LIBRARY = "diffusers_ctm"  # the package, its name in model_index.json, and the stem of the code beside a component

# None in the package. Else the file that this code runs from, read now: diffusers may overwrite it for another process.
_OWN_SOURCE = None if __name__ == f"{LIBRARY}.hub" else Path(__file__).read_bytes()


def register() -> None:
    """Make the package's classes known to diffusers. Replaces nothing of diffusers'; calling it again changes nothing.

    Pipelines are looked up as attributes of `diffusers`, components in `diffusers.pipelines.<library>`.
    """
    wanted = [(diffusers, name, cls) for name, cls in public_classes().items()]
    wanted.append((diffusers.pipelines, LIBRARY, sys.modules[LIBRARY]))
    for owner, name, value in wanted:
        present = getattr(owner, name, None)
        origin = getattr(present, "__module__", None) or getattr(present, "__name__", "")
        if present is None or origin.split(".")[0] == LIBRARY:
            setattr(owner, name, value)
        else:
            logging.get_logger(__name__).warning(
                f"{owner.__name__} has a {name} of its own; it stays, and ours is not registered."
            )


def public_classes() -> dict[str, type]:
    """The classes that the package exports, by name."""
    return {
        name: value
        for name, value in vars(sys.modules[LIBRARY]).items()
        if isinstance(value, type) and value.__module__.startswith(f"{LIBRARY}.")
    }


def component_library(value: object) -> object:
    """`value`, or if that is the (module, class name) of a class of ours, the (library, class name) that loads it.

    The module is one of the package, or a saved file that diffusers runs under a name with its folder or commit in it.
    """
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
        module, class_name = value
        if module.split(".")[0] == LIBRARY or getattr(sys.modules.get(module), "_OWN_SOURCE", None) is not None:
            return LIBRARY, class_name
    return value


def with_copies(classes: tuple[type, ...]) -> tuple[type, ...]:
    """`classes` of models, and for a saved file any model: the file beside a component has copies of these classes."""
    return classes if _OWN_SOURCE is None else (*classes, ModelMixin)


def write_loading_code(save_directory: str | os.PathLike, pipeline: DiffusionPipeline) -> None:
    """Write the code that loads `pipeline` where this package is missing, before its weights are saved.

    The same file is written as `pipeline.py` and as `<component>/diffusers_ctm.py` for each component of a class of
    ours. Folders are made as needed; a file is whole or absent.
    """
    source = bundle(type(pipeline)).encode() if _OWN_SOURCE is None else _OWN_SOURCE
    ours = [name for name in pipeline.components if pipeline.config[name][0] == LIBRARY]
    for path in [Path(save_directory, "pipeline.py"), *(Path(save_directory, name, f"{LIBRARY}.py") for name in ours)]:
        with written_aside(path) as aside:
            aside.write_bytes(source)


def remove_weights_loaded_first(folder: str | os.PathLike, safe_serialization: bool, variant: str | None) -> None:
    """Remove what diffusers leaves in the folder of a model and loads in place of the weights that are saved next.

    That is an index of several files, and beside a .bin file the .safetensors of an earlier save.
    """
    ends = ["safetensors.index.json", "bin.index.json", *([] if safe_serialization else ["safetensors"])]
    for end in ends:
        start, _, last = f"diffusion_pytorch_model.{end}".rpartition(".")
        Path(folder, ".".join(filter(None, [start, variant, last]))).unlink(missing_ok=True)


def bundle(pipeline_class: type[DiffusionPipeline]) -> str:
    """Source of one file with `pipeline_class`, every public class that is no pipeline, and what they import of ours.

    Each module follows those that it imports, and all share one namespace: no name may have two meanings in the
    package, and imports of ours must be `from .module import name` at the top (tests/package/test_hub.py checks both).
    """
    modules: dict[str, str] = {}  # source without its imports; imported modules come first
    imports: set[str] = set()  # statements that import from elsewhere

    def add(module: str) -> None:
        if module in modules:
            return
        source = inspect.getsource(importlib.import_module(module))
        tree, lines = ast.parse(source), source.splitlines()
        for node in tree.body:
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            if getattr(node, "level", 0):
                add(f"{LIBRARY}.{node.module}")
            else:
                start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                imports.update(start + ast.unparse(alias) for alias in node.names)
        body = "\n".join(lines[tree.body[0].lineno - 1 :]).strip()  # without the copyright line
        modules[module] = re.sub(r"\n{4,}", "\n\n\n", body)

    for cls in public_classes().values():
        if not issubclass(cls, DiffusionPipeline):
            add(cls.__module__)
    pipeline_class = next(cls for cls in pipeline_class.__mro__ if cls.__module__.startswith(f"{LIBRARY}."))
    add(pipeline_class.__module__)

    parts = [
        f"# Generated by diffusers-ctm {sys.modules[LIBRARY].__version__}: its modules in one file, for users who have "
        "not installed it:\n"
        "#     DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)\n"
        "# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.\n\n"
        + "\n".join(sorted(imports))
    ]
    parts += [f"# {name} {'-' * (117 - len(name))}\n\n{body}" for name, body in modules.items()]

    hidden = sorted(
        cls.__name__
        for cls in public_classes().values()
        if issubclass(cls, DiffusionPipeline) and cls.__module__ in modules and cls is not pipeline_class
    )
    if hidden:
        parts.append(
            "def __dir__() -> list[str]:\n"
            "    # diffusers asks `dir` for the one pipeline class of this file.\n"
            f"    return sorted(set(globals()) - set({hidden}))"
        )
    return "\n\n\n".join(parts) + "\n"
