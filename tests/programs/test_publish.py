# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What reaches the Hub, with which card and license, and that a training does not feel a Hub that fails.

The author and the user are processes of their own, for the client reads its settings when it is imported. They run this
file as a program, and the tests compare what they saw with what lies on the Hub.
"""

import functools
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
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save

from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT
from training import publish, train_ctm, train_edm
from training.cli.errors import UserError, without_token
from training.cli.files import sha256, write_files
from training.cli.options import parse_config, run_program
from training.cli.shared_options import TeacherOptions
from training.hub import client
from training.hub.client import LAST_CHECKPOINT, download_checkpoint
from training.hub.push import Pusher
from training.hub.record import training_record
from training.networks.teacher import load_teacher
from training.publish import PublishConfig
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


TOKEN = "hf_loopbackABCDEFGHIJKLMNOPQRSTUV"
NC = "cc-by-nc-sa-4.0"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
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
    client.RETRY_WAITS, sleep = (0.05, 0.05), time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # the client waits half a minute for a Hub that is away

    def command(*arguments: str):
        return attempt(publish.main, parse_config(PublishConfig, [str(argument) for argument in arguments]))

    options = {**SMALL, **NETWORK, "checkpointing_steps": 0, "max_train_steps": 2}
    teacher = Path(train_edm.main(EDMConfig(output_dir=str(work / "edm"), **options)))
    evaluation = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())
    folders = {"model": teacher, "dataset_name": work / "digits", "output_dir": work / "evaluation"}
    evaluation["options"] |= {name: str(folder) for name, folder in folders.items()}
    evaluation["features"]["name"] = str(work / "digits")
    evaluation["other_features"] = [{"name": str(work / "others")}]
    evaluation["results"] = [row | {"sampler": "heun"} for row in evaluation["results"] if row["gamma"] is None]
    files = {
        "notes.txt": f"remember {TOKEN}".encode(),
        "optimizer.bin": b"0" * 1000,
        "checkpoint-2/run_state.pt": b"0",
        "evaluation/evaluation.json": json.dumps(evaluation).encode(),
        "evaluation/evaluation.png": (ROOT / "assets/digits-ctm/evaluation/evaluation.png").read_bytes(),
    }
    write_files(str(teacher), files)
    for path in teacher.rglob("*.py"):
        path.unlink()  # as in assets/

    # Publishing and its refusals
    results = {
        "no license": command(teacher, "team/teacher"),
        "no repo yet": attempt(lambda: HfApi().model_info("team/teacher").id),
        "teacher": command(teacher, "team/teacher", "--license", NC, "--private"),
        "again": command(teacher, "team/teacher", "--license", NC),  # nothing changed
        "run folder": command(work / "edm", "team/nothing", "--license", "mit"),
    }
    broken = work / "broken"
    shutil.copytree(teacher, broken)
    weights, state = (teacher / WEIGHTS).read_bytes(), load_file(teacher / WEIGHTS)
    for case, content in {
        "truncated": weights[:-50],
        "missing": save({name: value for name, value in state.items() if name != "conv_in.weight"}),
        "not finite": save({name: value * float("nan") for name, value in state.items()}),
    }.items():
        (broken / WEIGHTS).write_bytes(content)
        results[case] = command(broken, "team/nothing", "--license", "mit")
    (broken / WEIGHTS).write_bytes(weights)
    (broken / "training.json").write_text(json.dumps({"dataset": {"name": TOKEN}}))
    results |= {
        "secret": command(broken, "team/secret", "--license", "mit"),
        "public asked private": command(teacher, "team/edited", "--license", NC, "--private"),
        "edited": command(teacher, "team/edited", "--license", NC),
        "edited, other license": command(teacher, "team/mitcard", "--license", NC),
        "edited meanwhile": command(teacher, "team/meanwhile", "--license", NC, "--num_samples", "0"),
    }

    # Training
    def distill(name: str, **options):
        options = {"teacher": "team/teacher", "max_solver_steps": 2, "max_train_steps": 5, **SMALL, **options}
        if "repo" in options:
            options |= {"push_to_hub": True, "hub_model_id": options.pop("repo")}
        return attempt(lambda: train_ctm.main(CTMConfig(output_dir=str(work / name), **options)))

    push = Pusher.push

    def push_and_wait(pusher, *arguments):
        push(pusher, *arguments)
        while os.path.isdir(pusher.room) and os.listdir(pusher.room):
            time.sleep(0.01)

    Pusher.push = push_and_wait  # each save then meets the Hub as it is at that time
    results["plain"] = distill("plain")
    results["midway"] = distill("midway", repo="team/midway")
    results["left behind"] = [path.name for path in (work / "midway" / ".push").glob("*")]
    Pusher.push = push
    results |= {
        "student": command(results["midway"], "team/student", "--license", NC),
        "student, mit": command(results["midway"], "team/mit", "--license", "mit"),
        "down at start": distill("later", repo="team/later", max_train_steps=2),
        "refused at end": distill("refused", repo="team/refused", max_train_steps=1, hub_strategy="end"),
        "forbidden": distill("forbidden", repo="team/forbidden"),
        "mit run": distill("mit_run", repo="team/mit", hub_license="mit"),
        # Resuming from the Hub
        "first": distill("first", repo="team/resume", max_train_steps=3, hub_strategy="checkpoint"),
        "resumed": distill("second", resume_from_checkpoint="team/resume"),
        "no checkpoint": distill("third", resume_from_checkpoint="team/midway"),
        "no repo": distill("third", resume_from_checkpoint="team/nowhere"),
    }
    damage = {"path_or_fileobj": b"other", "path_in_repo": f"{LAST_CHECKPOINT}/optimizer.bin", "repo_id": "team/resume"}
    HfApi().upload_file(**damage)
    results["tampered"] = distill("third", resume_from_checkpoint="team/resume")
    results["third written"] = (work / "third").exists()
    for name in ("plain", "midway", "resumed"):
        results[f"weights of {name}"] = sha256(Path(results[name], WEIGHTS))

    # A teacher that is published again after it was loaded
    command(teacher, "team/moved", "--license", NC, "--num_samples", "0")
    loaded = load_teacher(TeacherOptions("team/moved")).revision
    command(teacher, "team/moved", "--license", "mit", "--num_samples", "0")
    options = CTMConfig(teacher="team/moved")
    results["loaded"] = training_record(options, 1, revisions={"teacher": loaded})
    results["not loaded"] = training_record(options, 1)

    # A branch, a Hub that dies in the middle of an upload, two processes
    results |= {
        "branch": command(results["midway"], "team/branch", "--revision", "v2", "--num_samples", "0"),
        "branch again": command(results["midway"], "team/branch", "--revision", "v2", "--num_samples", "0"),
        "images": [attempt(image_of, "team/student"), attempt(image_of, "team/branch", "v2")],
        "died": command(results["midway"], "team/dies", "--num_samples", "0"),
    }
    (work / "died").touch()  # it comes back
    while "Error" in str(attempt(HfApi().model_info, "team/dies")):
        sleep(0.05)
    results["came back"] = command(results["midway"], "team/dies", "--num_samples", "0")
    AcceleratorState._reset_state(reset_partial_state=True)
    Pusher.push = push_and_wait
    processes = functools.partial(distill, "processes", max_train_steps=2, train_batch_size=2, repo="team/processes")
    results["processes"] = attempt(debug_launcher, processes, (), 2)
    return results


def image_of(repo: str, revision: str | None = None) -> str:
    """Digest of an image of a published pipeline, as USER draws it."""
    image = DiffusionPipeline.from_pretrained(repo, revision=revision)(
        class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    return hashlib.sha256(image.tobytes()).hexdigest()


REFUSED = {  # status and numbers of the requests that the Hub answers with it
    "/api/models/team/midway/commit/main": (503, range(2, 8)),  # saves 2 and 3 with all their attempts
    "/api/models/team/later/auth-check/write": (503, [1]),
    f"/team/edited/resolve/{0:040x}/README.md": (503, range(1, 11)),  # with the client's own attempts
    "/api/models/team/refused/commit/main": (403, range(1, 100)),
    "/api/models/team/forbidden/auth-check/write": (403, range(1, 100)),
}


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
        for name, files in {
            "edited": {"README.md": b"---\ntags: [mine]\n---\nMy words.\n"},
            "mitcard": {"README.md": b"---\nlicense: mit\n---\nMy words.\n"},
            "dies": {"model_index.json": b"before"},
        }.items():
            hub.repos[f"models/team/{name}"] = Repo([files], ["before"])

        def intercept(method: str, path: str) -> int | None:
            commits[path] = commits.get(path, 0) + 1
            if path == "/api/models/team/meanwhile/preupload/main" and commits[path] == 1:
                hub.repos["models/team/meanwhile"].commit({"README.md": b"My words.\n"})
            if path == "/api/models/team/dies/commit/main" and commits[path] == 1:
                hub.kill()
                threading.Thread(target=revive).start()
                time.sleep(0.5)  # the answer comes too late
            status, numbers = REFUSED.get(path, (None, ()))
            return status if commits[path] in numbers else None

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
        return results | {
            "user": run(hub, work / "home_user", "-c", USER, package=False),
            "repos": {name.removeprefix("models/team/"): repo for name, repo in hub.repos.items()},
            "work": work,
            "kept when it died": commits["files of team/dies when it died"],
        }


# What is uploaded  ----------------------------------------------------------------------------------------------------


def test_only_the_pipeline_its_card_pictures_and_measurements_with_public_names_are_uploaded(session):
    assert sorted(session["repos"]["teacher"].files) == [
        "README.md", "evaluation/evaluation.json", "evaluation/evaluation.png", "model_index.json", "pipeline.py",
        "samples.png", "scheduler/diffusers_ctm.py", "scheduler/scheduler_config.json", "training.json",
        "unet/config.json", WEIGHTS,
    ]  # fmt: skip
    assert "Not uploaded: checkpoint-2/, notes.txt, optimizer.bin" in session["output"]
    assert session["repos"]["teacher"].private and len(session["repos"]["teacher"].commits) == 2  # again: nothing to do
    assert "non-standard module" not in session["output"] and "ModuleList" not in session["output"]
    report = json.loads(session["repos"]["teacher"].files["evaluation/evaluation.json"])
    kept = json.loads((ROOT / "assets/digits-ctm/evaluation/evaluation.json").read_text())
    assert report["options"]["model"] == "edm" and report["options"]["dataset_name"] == "digits"
    assert "output_dir" not in report["options"] and report["features"]["name"] == "digits"
    assert report["other_features"][0]["name"] == "others"
    assert report["results"][0]["frechet"] == kept["results"][0]["frechet"]


def test_no_token_and_no_local_path_in_what_is_uploaded(session):
    for name, repo in session["repos"].items():
        for files in repo.commits:
            for path, content in files.items():
                folders = () if path.startswith(LAST_CHECKPOINT) else (str(session["work"]), str(ROOT))
                assert not [secret for secret in (TOKEN, *folders) if secret.encode() in content], (name, path)
    assert TOKEN not in session["output"]


def test_published_repo_loads_with_the_package_and_without_it(session):
    """By the lines of their cards, from a branch too."""
    assert all(re.fullmatch("[0-9a-f]{64}", image) for image in session["images"]), session["images"]
    assert session["user"].returncode == 0, session["user"].stderr[-2000:]
    assert json.loads(session["user"].stdout) == session["images"]


@pytest.mark.parametrize(
    "case, message",
    [
        ("no license", "--license is needed"),
        ("run folder", "is no pipeline.*Did you mean .*pipeline"),
        ("truncated", "broken cannot be loaded. Nothing was published"),
        ("missing", "broken do not fit its unet: .*missing_keys.*conv_in.weight"),
        ("not finite", "The pipeline .* has infinite or NaN weights: unet"),
        ("secret", "README.md holds an access token"),
        ("public asked private", "exists on the Hub and is public"),
        ("student, mit", f"license mit contradicts {NC} .non-commercial., .*its teacher team/teacher"),
        ("mit run", f"license mit contradicts {NC}"),
        ("edited, other license", f"would be kept, but its license mit contradicts {NC}"),
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
    data, text = made.data.to_dict(), made.text
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("team/teacher", "finetune", NC)
    assert "datasets" not in data  # the digits are not on the Hub
    sha = Repo.sha(session["repos"]["teacher"], 1)
    for part in (
        'from_pretrained("team/student", custom_pipeline="team/student", trust_remote_code=True)',
        "import diffusers_ctm\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("team/student")',
        f"[team/teacher](https://huggingface.co/team/teacher), commit `{sha}`",
        *("gamma", "num_inference_steps", "class_labels", "synthetic media", "@inproceedings{kim2024"),
        *("It has not been evaluated", "5 steps of 4 images", "| `max_solver_steps` | `2` |", "digits"),
    ):
        assert part in text, part
    assert not re.search(r"\{\{|\}\}|\{%|None", text.replace("{{The diffusers-ctm authors}}", ""))


def test_card_of_a_teacher_with_its_evaluation(session):
    made = card(session, "teacher")
    results, folder = made.data.eval_results, ROOT / "assets/digits-ctm/evaluation"
    truth = json.loads((folder / "evaluation.json").read_text())["results"][0]["frechet"]["mean"]
    assert results[0].metric_value == round(truth, 6) and "features digits" in results[0].metric_name
    lines = (folder / "evaluation.md").read_text().splitlines()
    one_step = next(line for line in lines if line.startswith("| 1 step")).split("|")[3]
    assert "±" in one_step and f"|{one_step}|" in made.text
    assert {(result.dataset_name, result.dataset_split) for result in results} == {("digits", "train")}
    assert "](evaluation/evaluation.png)" in made.text and "](evaluation/gammas.png)" not in made.text
    assert "Trained from scratch" in made.text and "kim2024" not in made.text and made.data.base_model is None


def test_edited_card_is_kept_and_its_license_is_checked(session):
    files = session["repos"]["edited"].files
    assert files["README.md"].endswith(b"My words.\n") and "model_index.json" in files
    assert "Kept the card of team/edited" in session["output"]
    assert list(session["repos"]["mitcard"].files) == ["README.md"]
    files = session["repos"]["meanwhile"].files  # edited while the files were sent
    assert files["README.md"] == b"My words.\n" and WEIGHTS in files
    assert "Kept the card of team/meanwhile" in session["output"]


# Pushing while training  ----------------------------------------------------------------------------------------------


def test_a_failing_hub_changes_nothing_in_the_training(session):
    assert session["weights of midway"] == session["weights of plain"] and session["left behind"] == []
    repo = session["repos"]["midway"]
    saves = [f"Training in progress, step {step}" for step in (1, 4, 5)]
    assert repo.messages[1:] == [*saves, "Publish the pipeline"]
    assert session["output"].count("Warning: team/midway on the Hub") == 1
    assert "team/midway on the Hub is up to date again: step 4" in session["output"]
    assert repo.files[WEIGHTS] == Path(session["midway"], WEIGHTS).read_bytes()
    assert json.loads(repo.files["training.json"])["steps"] == 5 and "5 steps of 4" in repo.files["README.md"].decode()
    assert not any(path.startswith(LAST_CHECKPOINT) for path in repo.files)


def test_hub_that_is_down_at_start_or_refuses_at_the_end_is_a_warning(session):
    assert session["down at start"].endswith("pipeline") and session["refused at end"].endswith("pipeline")
    assert "Warning: team/later on the Hub" in session["output"]
    assert "model_index.json" in session["repos"]["later"].files
    assert session["repos"]["refused"].files == {}
    assert f"python -m training.publish {session['refused at end']} team/refused" in session["output"]


def test_resumed_from_the_hub_is_uninterrupted(session):
    assert session["weights of resumed"] == session["weights of plain"]
    assert f"{LAST_CHECKPOINT}/run_state.pt" in session["repos"]["resume"].files
    assert "has no checkpoint of this program" in session["no checkpoint"]
    assert "nor a repository on the Hub" in session["no repo"]
    assert "is not what was uploaded: optimizer.bin" in session["tampered"]
    assert session["third written"] is False


def test_the_record_names_the_commit_that_was_loaded(session):
    """Although the Hub's main has another one, under another license, when the record is made."""
    for name, index, license in (("loaded", 1, NC), ("not loaded", 2, "mit")):
        revision = Repo.sha(session["repos"]["moved"], index)
        teacher = {"name": "team/moved", "on_hub": True, "revision": revision, "license": license}
        assert session[name]["teacher"] == teacher and session[name]["license"] == license


def test_server_killed_during_an_upload_leaves_the_repo_whole_and_the_same_command_succeeds(session):
    assert session["died"].startswith("UserError") and "could not be uploaded to team/dies" in session["died"]
    assert session["kept when it died"] == {"model_index.json": b"before"}
    repo = session["repos"]["dies"]
    assert session["came back"].endswith(repo.sha()) and repo.messages[1:] == ["Publish the pipeline"]
    assert WEIGHTS in repo.files and repo.files["model_index.json"] != b"before"


def test_a_branch_is_published_on_and_main_left_alone(session):
    repo = session["repos"]["branch"]
    assert repo.files == {} and set(repo.branches) == {"main", "v2"}
    assert session["branch"].endswith(repo.sha(1)) and session["branch again"].endswith(repo.sha(1))  # nothing new
    files = repo.commits[repo.branches["v2"]]
    assert 'from_pretrained("team/branch", revision="v2")' in files["README.md"].decode()
    assert files[WEIGHTS] == session["repos"]["student"].files[WEIGHTS]


def test_of_several_processes_one_pushes(session):
    assert session["processes"] is None, session["processes"]
    repo, folder = session["repos"]["processes"], session["work"] / "processes"
    assert repo.messages[1:] == ["Training in progress, step 1", "Training in progress, step 2", "Publish the pipeline"]
    assert json.loads(repo.files["training.json"])["images_per_step"] == 2 * 2
    assert repo.files[WEIGHTS] == (folder / "pipeline" / WEIGHTS).read_bytes()
    assert len(list((folder / "checkpoint-2").glob("random_states_*.pkl"))) == 2  # so many took part
    assert not (folder / ".push").exists()


# Rules, without a Hub  ------------------------------------------------------------------------------------------------


def test_other_licenses_are_published_afterwards(tmp_path):
    options = EDMConfig(output_dir=str(tmp_path / "run"), hub_model_id="a/b", hub_license="other")
    with pytest.raises(UserError, match="--license_name"):
        Pusher(options, {"teacher": None})


def test_positional_arguments_and_their_names_are_the_same():
    plain = parse_config(PublishConfig, ["runs/a", "user/a", "--private"])
    mixed = parse_config(PublishConfig, ["--license", "mit", "runs/a", "--num_samples", "0", "user/a"])
    named = parse_config(PublishConfig, ["--folder", "runs/a", "--name", "user/a"])
    assert {(c.folder, c.name) for c in (plain, mixed, named)} == {("runs/a", "user/a")}
    for wrong in (
        "runs/a",
        "runs/a a",
        "runs/a user/a --license other",
        "runs/a user/a --license MIT!",
        "a a/b --revision a'b",
    ):
        with pytest.raises(SystemExit):
            parse_config(PublishConfig, wrong.split())


FAILING_RUN = """
import threading
from pathlib import Path
from training.data.stream import ahead
from training.hub import push
from training.train_edm import EDMConfig

def hang(*_, **__):
    begun.release()
    threading.Event().wait()

def pieces():
    yield 1
    hang()

begun = threading.Semaphore(0)
push.open_repo = lambda *_: None
push.stage = hang  # as a Hub that never answers

def run():
    pusher = push.Pusher(EDMConfig(output_dir="run", hub_model_id="a/b", hub_license="mit"), {"license": "mit"})
    pusher.push(lambda folder: Path(folder).mkdir(parents=True), 1, "checkpoint-1")
    for _ in ahead(pieces(), 1):
        begun.acquire(), begun.acquire()
        raise ValueError("the run fails")

run()
"""


def test_a_run_that_fails_waits_neither_for_an_upload_nor_for_a_stream(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FAILING_RUN], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.endswith("ValueError: the run fails\n"), done.stderr


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


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "has no checkpoint of this program"),
        ("[]", "has no checkpoint of this program"),
        ('{"run_state.pt": 3}', "is not what was uploaded: run_state.pt"),
        ('{"run_state.pt": [1, "x", 2]}', "is not what was uploaded: run_state.pt"),
    ],
)
def test_checkpoints_with_a_broken_list_of_files_are_refused(content, message, tmp_path, monkeypatch):
    (tmp_path / LAST_CHECKPOINT).mkdir()
    (tmp_path / LAST_CHECKPOINT / "files.json").write_text(content)
    hub = SimpleNamespace(repo_exists=lambda repo: True, model_info=lambda repo: SimpleNamespace(sha="0"))
    monkeypatch.setattr(client, "api", lambda: hub)
    monkeypatch.setattr(client, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(UserError, match=message):
        download_checkpoint("a/b")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "author.json").write_text(json.dumps(author(folder)))
