# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What reaches the Hub, with which card and licence, and that a training does not feel a Hub that fails.

The author and the user are processes of their own, for the client reads its settings when it is imported. They run this file as
a program, and the tests compare what they saw with what lies on the Hub.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from diffusers_ctm import CTMPipeline, CTMScheduler
from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT
from training.cli.errors import UserError, without_token
from training.cli.names import public_name
from training.cli.options import parse_config, run_program
from training.hub import client as hub
from training.hub.card import make_card
from training.hub.client import LAST_CHECKPOINT
from training.hub.inheritance import check_inheritance, choose_licence
from training.hub.license import Licence
from training.hub.publication import draw_samples
from training.hub.record import changed_options, origin_record, training_record, write_record
from training.hub.staging import stage
from training.publish import PublishConfig
from training.train_ctm import CTMConfig


TOKEN = "hf_loopbackABCDEFGHIJKLMNOPQRSTUV"
NC = "cc-by-nc-sa-4.0"
NETWORK = {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
SMALL = {
    "label_column": "label",
    "train_batch_size": 4,
    "report_to": "none",
    "sample_every": 0,
    "logging_steps": 2,
    "checkpointing_steps": 1,
}


# The programs of the processes  ---------------------------------------------------------------------------------------


def attempt(function, *arguments):
    """The result of `function`, or its error as a string."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def author(work: Path) -> dict:
    """Train, publish and be refused."""
    import torch
    from accelerate import debug_launcher
    from accelerate.state import AcceleratorState
    from huggingface_hub import HfApi

    import training.hub.client
    import training.hub.push
    from training import publish, train_ctm, train_edm
    from training.train_ctm import CTMConfig
    from training.train_edm import EDMConfig

    training.hub.client.RETRY_WAITS, sleep = (0.05, 0.05), time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # the client waits half a minute for a Hub that is away
    results = {}

    def command(*arguments: str):
        return attempt(publish.main, parse_config(PublishConfig, [str(argument) for argument in arguments]))

    teacher = Path(
        train_edm.main(
            EDMConfig(output_dir=str(work / "edm"), max_train_steps=2, **{**SMALL, "checkpointing_steps": 0}, **NETWORK)
        )
    )
    (teacher / "notes.txt").write_text(f"remember {TOKEN}")
    (teacher / "optimizer.bin").write_bytes(b"0" * 1000)
    (teacher / "checkpoint-2").mkdir()
    (teacher / "checkpoint-2" / "run_state.pt").write_bytes(b"0")
    evaluation = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())
    evaluation["options"] |= {
        "model": str(teacher),
        "dataset_name": str(work / "digits"),
        "output_dir": str(work / "evaluation"),
    }
    evaluation["results"] = [row | {"sampler": "heun"} for row in evaluation["results"] if row["gamma"] is None]
    (teacher / "evaluation").mkdir()
    (teacher / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    shutil.copy(ROOT / "assets/digits-ctm/evaluation/evaluation.png", teacher / "evaluation")
    for path in teacher.rglob("*.py"):
        path.unlink()  # as in assets/

    # Publishing and its refusals
    results["no licence"] = command(teacher, "team/teacher")
    results["no repo yet"] = attempt(lambda: HfApi().model_info("team/teacher").id)
    results["teacher"] = command(teacher, "team/teacher", "--license", NC, "--private")
    results["again"] = command(teacher, "team/teacher", "--license", NC)  # nothing changed
    results["run folder"] = command(work / "edm", "team/nothing", "--license", "mit")
    broken = work / "broken"
    shutil.copytree(teacher, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    results["truncated"] = command(broken, "team/nothing", "--license", "mit")
    from safetensors.torch import load_file, save_file

    state = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({k: v for k, v in state.items() if k != "conv_in.weight"}, weights)
    results["missing"] = command(broken, "team/nothing", "--license", "mit")
    save_file({k: v * float("nan") for k, v in state.items()}, weights)
    results["not finite"] = command(broken, "team/nothing", "--license", "mit")
    shutil.copy(teacher / "unet" / "diffusion_pytorch_model.safetensors", weights)
    (broken / "training.json").write_text(json.dumps({"dataset": {"name": TOKEN}, "steps": 1, "images_per_step": 1}))
    results["secret"] = command(broken, "team/secret", "--license", "mit")
    results["public asked private"] = command(teacher, "team/edited", "--license", NC, "--private")
    results["edited"] = command(teacher, "team/edited", "--license", NC)
    results["edited, other licence"] = command(teacher, "team/mitcard", "--license", NC)

    # Training
    def distil(name: str, more: dict | None = None, **options):
        options |= more or {}
        options = {"teacher": "team/teacher", "max_solver_steps": 2, "max_train_steps": 5, **SMALL, **options}
        if "repo" in options:
            options |= {"push_to_hub": True, "hub_model_id": options.pop("repo")}
        return attempt(lambda: train_ctm.main(CTMConfig(output_dir=str(work / name), **options)))

    push = training.hub.push.Pusher.push

    def push_and_wait(pusher, *arguments):
        push(pusher, *arguments)
        while os.path.isdir(pusher.room) and os.listdir(pusher.room):
            time.sleep(0.01)

    training.hub.push.Pusher.push = push_and_wait  # each save then meets the Hub as it is at that time
    results["plain"] = distil("plain")
    results["midway"] = distil("midway", repo="team/midway")
    results["left behind"] = [path.name for path in (work / "midway" / ".push").glob("*")]
    results["student"] = command(results["midway"], "team/student", "--license", NC)
    results["student, mit"] = command(results["midway"], "team/mit", "--license", "mit")
    training.hub.push.Pusher.push = push
    results["down at start"] = distil("later", repo="team/later", max_train_steps=2)
    results["refused at end"] = distil("refused", repo="team/refused", max_train_steps=1, hub_strategy="end")
    results["forbidden"] = distil("forbidden", repo="team/forbidden")
    results["mit run"] = distil("mit_run", repo="team/mit", hub_license="mit")

    # Resuming from the Hub
    results["first"] = distil("first", repo="team/resume", max_train_steps=3, hub_strategy="checkpoint")
    results["resumed"] = distil("second", resume_from_checkpoint="team/resume")
    results["no checkpoint"] = distil("third", resume_from_checkpoint="team/midway")
    results["no repo"] = distil("third", resume_from_checkpoint="team/nowhere")
    damage = {"path_or_fileobj": b"other", "path_in_repo": f"{LAST_CHECKPOINT}/optimizer.bin", "repo_id": "team/resume"}
    attempt(lambda: HfApi().upload_file(**damage).oid)
    results["tampered"] = distil("third", resume_from_checkpoint="team/resume")
    results["third written"] = (work / "third").exists()

    def weights_of(name):
        return load_file(Path(results[name]) / "unet" / "diffusion_pytorch_model.safetensors")

    def is_plain(name: str) -> bool:
        plain, other = weights_of("plain"), weights_of(name)
        return all(torch.equal(plain[key], other[key]) for key in plain)

    results |= {f"{name} is plain": attempt(is_plain, name) for name in ("midway", "resumed")}

    # A branch, a Hub that dies in the middle of an upload, two processes
    results["branch"] = command(results["midway"], "team/branch", "--revision", "v2", "--num_samples", "0")
    results["branch again"] = command(results["midway"], "team/branch", "--revision", "v2", "--num_samples", "0")
    results["images"] = [attempt(image_of, "team/student"), attempt(image_of, "team/branch", "v2")]
    results["died"] = command(results["midway"], "team/dies", "--num_samples", "0")
    (work / "died").touch()  # it comes back
    while "Error" in str(attempt(HfApi().whoami)):
        sleep(0.05)
    results["came back"] = command(results["midway"], "team/dies", "--num_samples", "0")
    AcceleratorState._reset_state(reset_partial_state=True)
    training.hub.push.Pusher.push = push_and_wait
    processes = {"max_train_steps": 2, "train_batch_size": 2, "repo": "team/processes"}
    results["processes"] = attempt(lambda: debug_launcher(distil, ("processes", processes), num_processes=2))
    return results


def image_of(repo: str, revision: str | None = None) -> str:
    """Digest of an image of a published pipeline, as USER draws it."""
    import torch
    from diffusers import DiffusionPipeline

    image = DiffusionPipeline.from_pretrained(repo, revision=revision)(
        class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    return hashlib.sha256(image.tobytes()).hexdigest()


# Runs the line of each card that is for people without the package.
USER = """
import hashlib, json, re, sys, torch
sys.modules["diffusers_ctm"] = None
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
seen = []
for repo, revision in (("team/student", None), ("team/branch", "v2")):
    card = open(hf_hub_download(repo, "README.md", revision=revision)).read()
    exec(re.search("^pipe = .*trust_remote_code.*$", card, re.M)[0])
    image = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="np").images
    seen.append(hashlib.sha256(image.tobytes()).hexdigest())
print(json.dumps(seen))
"""


def run(hub: LoopbackHub, home: Path, *arguments: str, package: bool = True) -> subprocess.CompletedProcess:
    """A process that has this Hub and a cache of its own."""
    env = hub.environment(home, pythonpath=f"{ROOT}{os.pathsep}{ROOT / 'tests'}" if package else None)
    env |= {"OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN, "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    home.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *arguments], env=env, cwd=home, capture_output=True, text=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What the author and the user saw, and the Hub."""
    work = tmp_path_factory.mktemp("publish")
    commits = {}
    with ExitStack() as hubs:
        hub = hubs.enter_context(LoopbackHub())
        hub.repos["models/team/edited"] = Repo()
        hub.repos["models/team/edited"].commit({"README.md": b"---\ntags: [mine]\n---\nMy words.\n"})
        hub.repos["models/team/mitcard"] = Repo()
        hub.repos["models/team/mitcard"].commit({"README.md": b"---\nlicense: mit\n---\nMy words.\n"})
        hub.repos["models/team/dies"] = Repo()
        hub.repos["models/team/dies"].commit({"model_index.json": b"before"})

        def intercept(method: str, path: str) -> int | None:
            commits[path] = commits.get(path, 0) + 1
            if path == "/api/models/team/dies/commit/main" and commits[path] == 1:
                hub.kill()
                threading.Thread(target=revive).start()
                time.sleep(0.5)  # the answer comes too late
            if path == "/api/models/team/midway/commit/main" and 2 <= commits[path] <= 7:
                return 503  # saves 2 and 3 with all their attempts
            if path == "/api/models/team/later/auth-check/write" and commits[path] == 1:
                return 503
            if path.startswith("/team/edited/resolve/") and len(asked := commits.setdefault("card", [])) < 10:
                asked.append(path)
                return 503  # with the client's own attempts
            if path in ("/api/models/team/refused/commit/main", "/api/models/team/forbidden/auth-check/write"):
                return 403
            return None

        def revive():
            hub._thread.join()
            commits["files of team/dies when it died"] = dict(hub.repos["models/team/dies"].files)
            while not (work / "died").exists():
                time.sleep(0.02)
            again = LoopbackHub(int(hub.url.rsplit(":", 1)[1]))
            again.repos, again.intercept = hub.repos, intercept
            hubs.enter_context(again)

        hub.intercept = intercept
        done = run(hub, work / "home_author", __file__, str(work))
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads((work / "author.json").read_text()) | {"output": done.stdout + done.stderr}
        results["user"] = run(hub, work / "home_user", "-c", USER, package=False)
        results |= {
            "repos": {name.removeprefix("models/team/"): repo for name, repo in hub.repos.items()},
            "work": work,
            "kept when it died": commits["files of team/dies when it died"],
        }
        return results


# What is uploaded  ----------------------------------------------------------------------------------------------------


def test_only_the_pipeline_its_card_and_pictures_are_uploaded(session):
    assert sorted(session["repos"]["teacher"].files) == [
        "README.md", "evaluation/evaluation.json", "evaluation/evaluation.png", "model_index.json", "pipeline.py", "samples.png",
        "scheduler/diffusers_ctm.py", "scheduler/scheduler_config.json", "training.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert "Not uploaded: checkpoint-2/, notes.txt, optimizer.bin" in session["output"]
    assert session["repos"]["teacher"].private and len(session["repos"]["teacher"].commits) == 2  # again: nothing to do


def test_what_is_printed_is_short(session):
    assert "non-standard module" not in session["output"] and "ModuleList" not in session["output"]


def test_measurements_are_uploaded_with_public_names(session):
    report = json.loads(session["repos"]["teacher"].files["evaluation/evaluation.json"])
    kept = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())
    assert report["options"]["model"] == "edm" and report["options"]["dataset_name"] == "digits"
    assert "output_dir" not in report["options"]
    assert report["results"][0]["frechet"] == kept["results"][0]["frechet"]


def test_no_token_and_no_local_path_in_what_is_uploaded(session):
    for name, repo in session["repos"].items():
        for files in repo.commits:
            for path, content in files.items():
                assert TOKEN.encode() not in content, (name, path)
                if not path.startswith(LAST_CHECKPOINT):
                    assert str(session["work"]).encode() not in content and str(ROOT).encode() not in content, (
                        name,
                        path,
                    )
    assert TOKEN not in session["output"]


def test_published_repo_loads_with_the_package_and_without_it(session):
    """By the lines of their cards, from a branch too."""
    assert all(re.fullmatch("[0-9a-f]{64}", image) for image in session["images"]), session["images"]
    assert session["user"].returncode == 0, session["user"].stderr[-2000:]
    assert json.loads(session["user"].stdout) == session["images"]


@pytest.mark.parametrize(
    "case, message",
    [
        ("no licence", "--license is needed"),
        ("run folder", "is no pipeline.*Did you mean .*pipeline"),
        ("truncated", "broken does not load as a pipeline"),
        ("missing", "broken does not load as a pipeline.*conv_in.weight"),
        ("not finite", "not finite"),
        ("secret", "README.md holds an access token"),
        ("public asked private", "exists on the Hub and is public"),
        ("student, mit", f"licence mit contradicts {NC} .non-commercial., .*its teacher team/teacher"),
        ("mit run", f"licence mit contradicts {NC}"),
        ("edited, other licence", f"would be kept.*licence mit contradicts {NC}"),
        ("forbidden", "--push_to_hub: The Hub refuses team/forbidden"),
    ],
)
def test_refusals_say_why(session, case, message):
    assert re.search(message, session[case]), session[case]
    assert session[case].startswith("UserError")


def test_what_is_refused_creates_and_uploads_nothing(session):
    assert "RepositoryNotFoundError" in session["no repo yet"]
    assert not {"nothing", "mit"} & set(session["repos"])
    assert session["repos"]["secret"].files == {}
    assert not (session["work"] / "forbidden").exists() and not (session["work"] / "mit_run").exists()


# The card  ------------------------------------------------------------------------------------------------------------


def card(session, name) -> ModelCard:
    return ModelCard(session["repos"][name].files["README.md"].decode())


def test_card_of_a_student(session):
    made = card(session, "student")
    data = made.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("team/teacher", "finetune", NC)
    assert "datasets" not in data  # the digits are not on the Hub
    text = made.text
    assert 'from_pretrained("team/student", custom_pipeline="team/student", trust_remote_code=True)' in text
    assert (
        'import diffusers_ctm\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("team/student")'
        in text
    )
    for part in (
        "gamma",
        "num_inference_steps",
        "class_labels",
        "memorise",
        "synthetic media",
        "@inproceedings{kim2024",
        "It has not been evaluated",
    ):
        assert part in text, part
    sha = Repo.sha(session["repos"]["teacher"], 1)
    assert f"[team/teacher](https://huggingface.co/team/teacher), commit `{sha}`" in text
    assert "5 steps of 4 images" in text and "| `max_solver_steps` | `2` |" in text and "digits" in text
    assert not re.search(r"\{\{|\}\}|\{%|None", text.replace("{{The diffusers-ctm authors}}", ""))


def test_card_of_a_teacher_with_its_evaluation(session):
    made = card(session, "teacher")
    results = made.data.eval_results
    truth = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())["results"][0]["frechet"][
        "mean"
    ]
    assert results[0].metric_value == round(truth, 6) and "features digits" in results[0].metric_name
    table = (ROOT / "assets/digits-ctm/evaluation/evaluation.md").read_text().splitlines()
    one_step = next(line for line in table if line.startswith("| 1 step")).split("|")[3]
    assert "±" in one_step and f"|{one_step}|" in made.text and results[0].dataset_name == "digits"
    assert {result.dataset_split for result in results} == {"train"}
    assert "](evaluation/evaluation.png)" in made.text and "](evaluation/gammas.png)" not in made.text
    assert "Trained from scratch" in made.text and "kim2024" not in made.text and made.data.base_model is None


def test_metadata_is_plain_yaml(session):
    for name in ("student", "teacher", "midway"):
        text = session["repos"][name].files["README.md"].decode()
        assert text.startswith("---\n") and isinstance(yaml.safe_load(text.split("---\n")[1]), dict)


def test_edited_card_is_kept_and_its_licence_is_checked(session):
    files = session["repos"]["edited"].files
    assert files["README.md"].endswith(b"My words.\n") and "model_index.json" in files
    assert "Kept the card of team/edited" in session["output"]
    assert list(session["repos"]["mitcard"].files) == ["README.md"]


# Pushing while training  ----------------------------------------------------------------------------------------------


def test_a_failing_hub_changes_nothing_in_the_training(session):
    assert session["midway is plain"] and session["left behind"] == []
    repo = session["repos"]["midway"]
    assert repo.messages[1:] == [
        "Training in progress, step 1", "Training in progress, step 4", "Training in progress, step 5", "Publish the pipeline"
    ]  # fmt: skip
    assert session["output"].count("Warning: team/midway on the Hub") == 1
    assert "team/midway on the Hub is up to date again: step 4" in session["output"]
    final = Path(session["midway"]) / "unet" / "diffusion_pytorch_model.safetensors"
    assert repo.files["unet/diffusion_pytorch_model.safetensors"] == final.read_bytes()
    assert json.loads(repo.files["training.json"])["steps"] == 5 and "5 steps of 4" in repo.files["README.md"].decode()
    assert not any(path.startswith(LAST_CHECKPOINT) for path in repo.files)


def test_hub_that_is_down_at_start_or_refuses_at_the_end_is_a_warning(session):
    assert session["down at start"].endswith("pipeline") and session["refused at end"].endswith("pipeline")
    assert "Warning: team/later on the Hub" in session["output"]
    assert "model_index.json" in session["repos"]["later"].files
    assert session["repos"]["refused"].files == {}
    assert f"python -m training.publish {session['refused at end']} team/refused" in session["output"]


def test_resumed_from_the_hub_is_uninterrupted(session):
    assert session["resumed is plain"], session["resumed"]
    assert f"{LAST_CHECKPOINT}/run_state.pt" in session["repos"]["resume"].files
    assert "has no checkpoint of this program" in session["no checkpoint"]
    assert "nor a repository on the Hub" in session["no repo"]
    assert "is not what was uploaded: optimizer.bin" in session["tampered"]
    assert session["third written"] is False


def test_server_killed_during_an_upload_leaves_the_repo_whole_and_the_same_command_succeeds(session):
    assert session["died"].startswith("UserError") and "could not be uploaded to team/dies" in session["died"]
    assert session["kept when it died"] == {"model_index.json": b"before"}
    repo = session["repos"]["dies"]
    assert session["came back"].endswith(repo.sha()) and repo.messages[2:] == ["Publish the pipeline"]
    assert "unet/diffusion_pytorch_model.safetensors" in repo.files and repo.files["model_index.json"] != b"before"


def test_a_branch_is_published_on_and_main_left_alone(session):
    repo = session["repos"]["branch"]
    assert repo.files == {} and set(repo.branches) == {"main", "v2"}
    assert session["branch"].endswith(repo.sha(1)) and session["branch again"].endswith(repo.sha(1))  # nothing new
    files = repo.commits[repo.branches["v2"]]
    assert 'from_pretrained("team/branch", revision="v2")' in files["README.md"].decode()
    assert files["unet/diffusion_pytorch_model.safetensors"] == session["repos"]["student"].files["unet/diffusion_pytorch_model.safetensors"]  # fmt: skip


def test_of_several_processes_one_pushes(session):
    assert session["processes"] is None, session["processes"]
    repo, folder = session["repos"]["processes"], session["work"] / "processes"
    assert repo.messages[1:] == ["Training in progress, step 1", "Training in progress, step 2", "Publish the pipeline"]
    assert json.loads(repo.files["training.json"])["images_per_step"] == 2 * 2
    final = folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert repo.files["unet/diffusion_pytorch_model.safetensors"] == final.read_bytes()
    assert len(list((folder / "checkpoint-2").glob("random_states_*.pkl"))) == 2  # so many took part
    assert not (folder / ".push").exists()


# Rules, without a Hub  ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inherited, wanted, allowed",
    [
        (NC, NC, True), (NC, "mit", False), (NC, "cc-by-nc-4.0", False), ("mit", "apache-2.0", True), ("mit", NC, True),
        ("cc-by-sa-4.0", "mit", False), ("openrail", "mit", False), ("other", "mit", False), (None, "mit", True),
        ("other", "other", True),
    ],
)  # fmt: skip
def test_licence_is_inherited(inherited, wanted, allowed):
    licence = None if inherited is None else Licence(inherited)
    if allowed:
        check_inheritance(licence, "because", Licence(wanted))
    else:
        with pytest.raises(UserError, match=f"{wanted} contradicts {inherited}.*because"):
            check_inheritance(licence, "because", Licence(wanted))


def test_one_other_licence_is_not_another():
    ours, theirs = (Licence("other", name, f"https://example.com/{name}") for name in ("ours", "theirs"))
    check_inheritance(theirs, "because", theirs)
    check_inheritance(theirs, "because", Licence("other"))
    with pytest.raises(UserError, match=r"other \(ours\) contradicts other \(theirs\)"):
        check_inheritance(theirs, "because", ours)


@pytest.mark.parametrize(
    "record, conversion, card, expected",
    [
        ({"license": "mit", "teacher": {"name": "t", "license": NC}}, {}, "", NC),  # whatever the run called it
        ({"license": NC, "teacher": {"name": "t", "license": "mit"}}, {}, "", NC),
        ({"license": "mit", "teacher": {"name": "t", "license": "apache-2.0"}}, {}, "", "mit"),
        ({"license": "mit", "teacher": None, "first_stage": {"name": "f", "license": NC}}, {}, "", NC),
        ({"teacher": {"name": "t"}}, {"license": NC}, "mit", NC),
        ({"teacher": None}, {}, "openrail", "openrail"),
        ({}, {"license": None}, "unknown", None),
        ({"license": NC}, {}, "[no yaml", NC),
        ({"license": "mit", "teacher": "t", "first_stage": [NC]}, {}, "mit", "mit"),
    ],
)
def test_a_student_of_a_student_inherits_from_both(record, conversion, card, expected, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(record))
    (tmp_path / "conversion.json").write_text(json.dumps(conversion))
    if card:
        (tmp_path / "README.md").write_text(f"---\nlicense: {card}\n---\nA card.\n")
    found = origin_record(str(tmp_path), None)
    assert (found.get("license"), found["name"], found["on_hub"]) == (expected, tmp_path.name, False)


@pytest.mark.parametrize("teacher", [None, {"name": "t", "license": "mit"}])
def test_what_starts_from_a_first_stage_inherits_its_licence_and_says_so(teacher, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "training.json").write_text(json.dumps({"license": NC}))
    options = CTMConfig(output_dir="r", init_from=str(tmp_path / "first"), teacher="t")
    record = training_record(options, 1, str(tmp_path / "first")) | {"teacher": teacher}
    assert (record["license"], record["first_stage"]["name"]) == (NC, "first")
    assert "init_from" not in record["options"] and training_record(options, 1)["first_stage"] is None
    write_record(record | {"license": "mit"}, 3, str(tmp_path))  # by --hub_license
    with pytest.raises(UserError, match=f"mit contradicts {NC}.*its first stage first has that"):
        choose_licence(str(tmp_path), None)
    (tmp_path / "unet").mkdir()
    card = make_card(str(tmp_path), "a/b", Licence(NC))
    assert f"started from the weights of `first`, whose licence is {NC}." in card
    assert ("Distilled from `t`." in card) == (teacher is not None) and "from scratch" not in card


def test_other_licences_are_published_afterwards(tmp_path):
    from training.hub.push import Pusher
    from training.train_edm import EDMConfig

    options = EDMConfig(output_dir=str(tmp_path / "run"), hub_model_id="a/b", hub_license="other")
    with pytest.raises(UserError, match="--license_name"):
        Pusher(options, {"teacher": None})


def test_positional_arguments_and_their_names_are_the_same(capsys):
    plain = parse_config(PublishConfig, ["runs/a", "user/a", "--private"])
    mixed = parse_config(PublishConfig, ["--license", "mit", "runs/a", "--num_samples", "0", "user/a"])
    named = parse_config(PublishConfig, ["--folder", "runs/a", "--name", "user/a"])
    assert {(c.folder, c.name) for c in (plain, mixed, named)} == {("runs/a", "user/a")}
    wrong = [["runs/a"], ["runs/a", "a"], ["runs/a", "user/a", "--license", "other"], ["a", "a/b", "--revision", "a'b"]]
    for arguments in wrong:
        with pytest.raises(SystemExit):
            parse_config(PublishConfig, arguments)


def test_names_that_may_be_published(tmp_path):
    assert public_name("user/name") == "user/name"
    assert (
        public_name(str(tmp_path / "run" / "pipeline")) == "run"
        and public_name("/a/b/images.parquet") == "images.parquet"
    )
    options = CTMConfig(
        teacher="t", dataset_name=str(tmp_path), output_dir="/secret/place", learning_rate=1.0, hub_model_id="a/b",
        discriminator_weight=1.0, discriminator_backbones=["/secret/features", "user/name"],
    )  # fmt: skip
    expected = {"dataset_name": tmp_path.name, "learning_rate": 1.0}
    expected |= {"discriminator_weight": 1.0, "discriminator_backbones": ["features", "user/name"]}
    assert changed_options(options) == expected
    assert (
        public_name(str(tmp_path / "run" / "checkpoint-20")) == "run"
        and public_name("checkpoint-20") == "checkpoint-20"
    )


def test_tokens_are_hidden(monkeypatch, capsys):
    assert without_token(f"Bearer {TOKEN} refused") == "Bearer *** refused"
    assert without_token("shf_aaaaaaaaaaaaaaaaaaaaaaaaaaaa hf_short") == "shf_aaaaaaaaaaaaaaaaaaaaaaaaaaaa hf_short"
    monkeypatch.setenv("HF_TOKEN", "not-a-usual-token")
    assert without_token("not-a-usual-token") == "***"

    def fail(config):
        raise UserError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr(sys, "argv", ["publish", "runs/a", "user/a"])
    with pytest.raises(SystemExit):
        run_program(fail, PublishConfig)
    assert capsys.readouterr().err == "error: Illegal header value b'Bearer ***'\n"


@pytest.mark.parametrize("content", ["{", "[]", '{"run_state.pt": 3}', '{"run_state.pt": [1, "x", 2]}'])
def test_checkpoints_with_a_broken_list_of_files_are_refused(content, tmp_path, monkeypatch):
    folder = tmp_path / LAST_CHECKPOINT
    folder.mkdir()
    (folder / "files.json").write_text(content)
    monkeypatch.setattr(hub, "api", lambda: SimpleNamespace(model_info=lambda repo: SimpleNamespace(sha="0")))
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(UserError, match="has no checkpoint of this program"):
        hub.download_checkpoint("a/b")


def test_the_card_names_no_folder_of_features(tmp_path):
    report = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())
    report["features"]["name"] = "/home/someone/features"
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(report))
    card = make_card(str(tmp_path), "a/b", Licence("mit"))
    assert "features `features`" in card and "someone" not in card


def test_the_card_says_memorisation_attribution_and_the_classes_that_can_be_asked(tmp_path):
    rows = [
        {"name": "1 step", "num_images": 1000, "pixels": {"median": 31.26, "percentile_5": 9.0, "min": 1.0, "copies": 0.012}},
        {"name": "held-out images", "num_images": 50, "pixels": {"median": 40.0, "percentile_5": 9, "min": 1, "copies": 0.0}},
    ]  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    report = {"results": rows, "num_training_images": 1865}
    (tmp_path / "evaluation" / "memorisation.json").write_text(json.dumps(report))
    (tmp_path / "evaluation" / "memorisation.png").write_bytes(b"0")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"num_class_embeds": 3, "sample_size": 16}))
    (tmp_path / "model_index.json").write_text(json.dumps({"null_class": 2, "id2label": {"0": "a", "1": "b"}}))
    record = {"program": "training.train_ctm", "dataset": {"name": "twemoji.parquet"}, "steps": 9, "images_per_step": 4}
    (tmp_path / "training.json").write_text(json.dumps(record))
    card = make_card(str(tmp_path), "a/b", Licence("cc-by-4.0"))
    assert "| Classes | 2 |" in card and "from 0 to 1" in card
    assert "1 step: 31.3, 1.2% of 1,000; held-out images: 40.0, 0.0% of 50." in card and "1,865 training images" in card
    assert "](evaluation/memorisation.png)" in card
    assert "Twitter, Inc and other contributors" in card and "made smaller" in card
    (tmp_path / "evaluation" / "memorisation.json").unlink()
    assert "nearest to" not in make_card(str(tmp_path), "a/b", Licence("cc-by-4.0"))


def test_a_null_class_is_not_sampled(make_unet, monkeypatch):
    asked, call = [], CTMPipeline.__call__

    def listening(self, **options):
        asked.append(options["class_labels"])
        return call(self, **options)

    monkeypatch.setattr(CTMPipeline, "__call__", listening)
    draw_samples(CTMPipeline(make_unet(num_class_embeds=3), CTMScheduler(), null_class=2), 4, "x", "cpu")
    assert asked == [[0, 1, 0, 1]]


def test_what_others_wrote_stays_text_in_the_card(tmp_path):
    """A teacher's licence, classes and records come from its author: no line, link, table or heading of the card is theirs."""
    evil = "a`b|c\n---\nlicense: mit\n# Run [this](https://evil.example)\n<script>"
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
    origin = {"name": evil, "revision": evil, "license": "other", "license_name": evil, "license_link": "javascript:x"}
    record = {"program": evil, "teacher": origin, "first_stage": origin, "steps": 1, "images_per_step": 1}
    record |= {"dataset": {"name": evil, "split": evil}, "options": {evil: evil}, "versions": {evil: evil}}
    record |= {"distance": {"name": evil, evil: evil}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    (tmp_path / "conversion.json").write_text(json.dumps({"source": evil, "family": evil}))
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": {"0": evil}}))
    card = make_card(str(tmp_path), "a/b", Licence("other", evil, "javascript:x"))
    assert ModelCard(card).data.to_dict()["license"] == "other"
    body = card.split("\n---\n", 1)[1]
    assert "\n# Run" not in body and "\n---" not in body and "javascript:" not in body
    assert not re.search(r"(?<!\\)(<script|\[this\])", re.sub(r"`[^`\n]*`", "", body))
    for line in body.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    "link, written", [("https://a.example/x", True), ("LICENSE", True), ("ftp://a", False), ("x) [y](https://z", False)]
)
def test_a_licence_links_to_the_web_or_into_the_repository(link, written, tmp_path):
    (tmp_path / "unet").mkdir()
    assert (f"[My terms]({link})" in make_card(str(tmp_path), "a/b", Licence("other", "My terms", link))) == written


def test_the_card_tells_of_presets(tmp_path):
    presets = {"10": {"gamma": 0.2}, "2": {"sigmas": [80.0, 1.0]}}
    for name, options in (("plain", {}), ("tuned", {"presets": presets})):
        CTMScheduler(**options).save_pretrained(tmp_path / name / "scheduler")
    plain, tuned = (make_card(str(tmp_path / name), "a/b", Licence("mit")) for name in ("plain", "tuned"))
    assert "after each jump.\n- The exact score" in plain and "presets" not in plain
    assert "after each jump.\n- 2, 10 steps have schedules of their own" in tuned


def test_staging_the_embedded_pipelines(tmp_path):
    left = stage(str(ROOT / "assets" / "digits-ctm"), str(tmp_path))
    assert left == [] and "_name_or_path" not in json.loads((tmp_path / "unet" / "config.json").read_text())
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert stage(str(ROOT / "assets" / "emoji-ctm"), str(tmp_path / "emoji")) == []
    assert "Twitter, Inc" in (tmp_path / "emoji" / "NOTICE.md").read_text()  # attribution goes along


@pytest.mark.parametrize("part", ["../other", "/etc", "a b", ""])
def test_parts_of_a_pipeline_lie_in_its_folder(part, tmp_path):
    """A folder of someone else may name others in its index."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    folder, target = tmp_path / "pipeline", tmp_path / "a" / "target"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({part: ["diffusers", "UNet2DModel"]}))
    with pytest.raises(UserError, match="no folders in it"):
        stage(str(folder), str(target))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "name", ["NOTICE.md", "training.json", "scheduler/scheduler_config.json", "evaluation/gammas.png"]
)
def test_a_link_out_of_the_folder_is_not_followed(name, tmp_path):
    """As in a folder that was unpacked or cloned; links of the Hub's cache are its way to keep files."""
    folder, (secret, blob) = tmp_path / "pipe", (tmp_path / "id_rsa", tmp_path / "blobs" / "5f")
    for path in (folder / "scheduler" / "x", folder / "evaluation" / "x", blob):
        path.parent.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"scheduler": ["diffusers", "DDPMScheduler"]}')
    secret.write_text("{}"), blob.write_text("{}")
    for number, (target, allowed) in enumerate([(secret, False), (blob, True)]):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        staged = tmp_path / f"staged{number}"
        if allowed:
            stage(str(folder), str(staged))
        else:
            with pytest.raises(UserError, match="is a link to .*id_rsa"):
                stage(str(folder), str(staged))
        assert (staged / name).exists() == allowed


def test_of_a_component_only_its_config_and_weights_are_staged(tmp_path):
    folder, target = tmp_path / "pipeline", tmp_path / "target"
    shutil.copytree(ROOT / "assets" / "digits-edm", folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    (tmp_path / "secret").write_text("a key")
    (folder / "unet" / "notes.json").symlink_to(tmp_path / "secret")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"0")
    checker = {
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json",
    }
    for path in checker:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["diffusers", "Some"], "feature_extractor": ["transformers", "Other"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    left = stage(str(folder), str(target))
    assert "unet/notes.json" in left and not checker & set(left)
    assert all((target / path).is_file() for path in checker)
    assert {path.name for path in (target / "unet").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    }  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "author.json").write_text(json.dumps(author(folder)))
