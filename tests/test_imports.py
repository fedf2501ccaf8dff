# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The floors of the house: a module imports from its own room and from floors below, and nothing imports a program."""

import ast

import pytest

from helpers.places import ROOT


# A room stands above all that it imports. Rooms that share a floor do not know each other.
FLOORS = [
    {"diffusers_ctm", "training.report"},
    {"training.cli"},
    {"training.data", "training.official", "training.hub"},
    {"training.networks", "training.frozen"},
    {"training.objective", "training.measure"},
    {"training.run"},
    {"training.studies"},
    {"demo"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = [path for top in ("diffusers_ctm", "training", "demo") for path in sorted((ROOT / top).rglob("*.py"))]
PROGRAMS = {f"training.{path.stem}" for path in (ROOT / "training").glob("*.py")} - {"training.__init__"}
RUN_PROGRAMS = {"training.study", "training.benchmark"}  # their subject is train_ctm


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return ".".join(module.split(".")[: 2 if module.startswith("training.") else 1])


def imported(path):
    """(module of ours, whether it is imported at the top) for every import in the file at `path`."""
    tree, package = ast.parse(path.read_text()), path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = [*base, *filter(None, [node.module])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("diffusers_ctm", "training", "demo"):
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
                yield name if is_module else name.rpartition(".")[0] or name, node in tree.body


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down(path):
    importer = name_of(path)
    for module, at_the_top in imported(path):
        where = f"{path.relative_to(ROOT)} imports {module}"
        assert at_the_top, f"{where} inside a function"
        if module in PROGRAMS:
            assert importer in RUN_PROGRAMS, f"{where}, which is a program"
        elif importer not in PROGRAMS and room_of(importer) != room_of(module):
            assert FLOOR[room_of(module)] < FLOOR[room_of(importer)], f"{where}, which is not below it"


def test_no_circle():
    """Inside a room, too, imports have a direction."""
    graph = {name_of(path): {module for module, _ in imported(path)} for path in SOURCES}
    done = set()

    def visit(module, above):
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in done:
            for below in graph.get(module, ()):
                visit(below, [*above, module])
            done.add(module)

    for module in graph:
        visit(module, [])
