# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The README's commands in a row, against a Hub on loopback: publish, distill by name, push, evaluate.

The teachers of others, EDM2's files and a repository of DiT, go on from there to users with the package and without it.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_ctm import CTMPipeline, EDM2UNet2DModel, EDMHeunScheduler
from helpers.autoencoders import make_autoencoder
from helpers.comparing import close, seeded
from helpers.loopback_hub import Files, LoopbackHub, Repo
from helpers.official_edm2 import halves, latent_encoder, precond_of, snapshot
from helpers.places import ROOT
from helpers.tiny_networks import DIT_TINY, TINY, fill, make_edm2
from training.data.sources import digits
from training.official import edm2


NC = "cc-by-nc-sa-4.0"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_from_a_published_teacher_to_an_evaluated_student(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**TINY, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10})
    names = {number: str(number) for number in range(10)}
    CTMPipeline(unet, EDMHeunScheduler(sigma_data=0.75), id2label=names).save_pretrained(str(tmp_path / "teacher"))
    images = digits().select(range(200)).rename_columns({"image": "scan", "label": "digit"})
    images.to_parquet(tmp_path / "images.parquet")
    with LoopbackHub() as hub:
        hub.repos["datasets/team/scans"] = Repo()
        hub.repos["datasets/team/scans"].commit({"data/train.parquet": (tmp_path / "images.parquet").read_bytes()})
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

        def command(*arguments):
            done = subprocess.run(
                [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        command("training.publish", tmp_path / "teacher", "team/teacher", "--license", NC)
        data = ["--dataset_name", "team/scans", "--image_column", "scan", "--label_column", "digit"]
        options = ["--teacher", "team/teacher", *data, "--max_train_steps", 2, "--train_batch_size", 4]
        options += ["--checkpointing_steps", 1, "--sample_every", 0, "--output_dir", tmp_path / "run"]
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "training.train_ctm"]
        command(*launcher, *options, "--push_to_hub", "--hub_model_id", "team/student")
        files = hub.repos["models/team/student"].files
        assert WEIGHTS in files and not any("checkpoint" in path for path in files)
        card = files["README.md"].decode()
        assert f"license: {NC}" in card and "base_model: team/teacher" in card

        evaluation = [*data, "--num_samples", 80, "--seeds", 0, "--kid", "false"]
        evaluation += ["--steps", 1, "--gammas", 0, "--teacher_steps", 2, "--paired_samples", 10]
        evaluation += ["--output_dir", tmp_path / "evaluation"]
        command("training.evaluate", "--model", "team/student", "--teacher", "team/teacher", *evaluation)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {row["sampler"] for row in report["results"]} == {"ctm", "heun"}
    assert report["reference"]["dataset_name"] == "team/scans" and report["reference"]["num_images"] == 200
    assert os.path.getsize(tmp_path / "evaluation" / "evaluation.png") > 5000


# The teachers of others -----------------------------------------------------------------------------------------------

REVERSED = {number: str(9 - number) for number in range(10)}  # names of a network's classes, not in the data's order


@dataclass
class Case:
    """What others have made, and what a student of it must do.

    Args:
        files: of the repositories that are there before, by name.
        commands: from them to the repository `teacher`; none if it is one of them.
        teacher: the repository that is distilled.
        network: the student's class.
        labels: the network's numbers of the data's classes "3" and "7".
        denoise: D(x, sigma, labels) of the network that others have made, sigma a number.
        levels: where two jumps start, and where the second ends.
        size: of the images.
        shown: the images in [0, 1] of states, without clipping.
        license: of the weights.
        vae: the autoencoder's repository and license.
    """

    files: dict[str, Files]
    commands: list[list]
    teacher: str
    network: str
    labels: list[int]
    denoise: Callable
    levels: list[float]
    size: int
    shown: Callable
    license: str
    vae: tuple[str, str] | None = None

    @property
    def student(self) -> str:
        """The repository that it is pushed to."""
        return f"{self.teacher}-student"


def files_of(folder: Path, license: str) -> Files:
    """A folder as a repository with a card."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**files, "README.md": f"---\nlicense: {license}\n---\n".encode()}


def edm2_denoiser(network: EDM2UNet2DModel, sigma_data: float) -> Callable:
    """D of EDM2's authors (Karras et al. 2022, Table 1) with the float16 weights of their file."""
    network = edm2.to_diffusers(halves(edm2.to_official(network)), attention_head_dim=8)

    def denoise(x, sigma, labels):
        total = sigma**2 + sigma_data**2
        output = network(x / total**0.5, math.log(sigma) / 4, class_labels=labels).sample
        return sigma_data**2 / total * x + sigma * sigma_data / total**0.5 * output

    return denoise


def edm2_of_pixels(work: Path) -> Case:
    """Their file on the Hub, and names of its classes."""
    network, names, folder = make_edm2(num_class_embeds=10), work / "names.json", work / "edm2"
    names.write_text(json.dumps(REVERSED))
    convert = ["training.convert", "nvlabs/edm2/img8/edm2.pkl", folder, "--license", NC, "--id2label", names]
    return Case(
        files={"nvlabs/edm2": {"img8/edm2.pkl": snapshot(precond_of(network, sigma_data=0.7))}},
        commands=[convert, ["training.publish", folder, "team/pixels", "--num_samples", 2]],
        teacher="team/pixels",
        network="EDM2UNet2DModel",
        labels=[6, 2],
        denoise=edm2_denoiser(network, 0.7),
        levels=[80.0, 1.0, 0.002],
        size=8,
        shown=lambda states: states / 2 + 0.5,
        license=NC,
    )


def edm2_of_latents(work: Path) -> Case:
    """Their file here, with the numbers of its latents, and an autoencoder on the Hub."""
    network = make_edm2(seed=1, in_channels=4, out_channels=4, num_class_embeds=10)
    autoencoder, folder = make_autoencoder("KL", seed=1), work / "edm2-latent"
    mean, std = [0.5, -1.0, 0.25, 2.0], [1.5, 0.5, 1.0, 3.0]
    (work / "latent.pkl").write_bytes(snapshot(precond_of(network), latent_encoder(mean, std)))
    autoencoder.save_pretrained(work / "vae")
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    convert = ["training.convert", work / "latent.pkl", folder, "--license", NC, "--vae", "team/vae"]
    return Case(
        files={"team/vae": files_of(work / "vae", "openrail")},
        commands=[convert, ["training.publish", folder, "team/latents", "--num_samples", 2]],
        teacher="team/latents",
        network="EDM2UNet2DModel",
        labels=[3, 7],
        denoise=edm2_denoiser(network, 0.5),
        levels=[80.0, 1.0, 0.002],
        size=32,
        shown=lambda states: autoencoder.decode(states * std + mean).sample,  # it works on images in [0, 1]
        license=NC,
        vae=("team/vae", "openrail"),
    )


def dit(work: Path) -> Case:
    """A repository as facebook/DiT-XL-2-256: variances, pickles, and the class that the network had at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changes = {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
        network = fill(DiTTransformer2DModel(**{**DIT_TINY, **changes})).eval()
    autoencoder, scheduler = make_autoencoder("KL", seed=2), DDIMScheduler(clip_sample=False)
    DiTPipeline(network, autoencoder, scheduler).save_pretrained(work / "dit", safe_serialization=False)
    for file, changes in (
        ("model_index.json", {"id2label": REVERSED}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel", "cross_attention_dim": None}),
    ):
        path = work / "dit" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    abar = scheduler.alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()

    def denoise(x, sigma, labels):
        timestep = (levels - sigma).abs().argmin()
        output = network(x / (1 + sigma**2) ** 0.5, timestep.expand(len(x)), labels).sample
        return x - sigma * output[:, :4]

    return Case(
        files={"team/dit": files_of(work / "dit", "cc-by-nc-4.0")},
        commands=[],
        teacher="team/dit",
        network="CTMDiTTransformer2DModel",
        labels=[6, 2],
        denoise=denoise,
        levels=levels[[999, 500, 0]].tolist(),
        size=32,
        shown=lambda states: autoencoder.decode(states / autoencoder.config.scaling_factor).sample / 2 + 0.5,
        license="cc-by-nc-4.0",
        vae=("team/dit", "cc-by-nc-4.0"),
    )


CASES = {"EDM2 of pixels": edm2_of_pixels, "EDM2 of latents": edm2_of_latents, "DiT": dit}

# Commands one after the other, in one process: importing takes longer than they do.
AUTHOR = """
import json, runpy, sys
from accelerate.state import AcceleratorState
for module, *arguments in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

# Calls pipelines, with the package or trusting the code that they bring.
USER = """
import json, sys
user, calls, file = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if user == "with":
    import diffusers_ctm
else:
    sys.modules["diffusers_ctm"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
images, classes = {}, {}
for source, options in calls.items():
    trust = {} if user == "with" else {"custom_pipeline": source, "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(source, **trust)
    for kind in ("latent", "pt"):
        generator = torch.Generator().manual_seed(0)
        images[f"{source} {kind}"] = pipe(**options, generator=generator, output_type=kind).images.contiguous()
    classes[source] = [[type(part).__module__, type(part).__name__] for part in (pipe, pipe.unet, pipe.scheduler)]
save_file(images, file)
print(json.dumps(classes))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The cases, the folders of their students, the Hub's files at the end, and what the users saw."""
    work, commands, calls = tmp_path_factory.mktemp("shared"), [], {}
    cases = {name: make(work) for name, make in CASES.items()}
    folders = {name: f"{work}/runs/{case.student}/pipeline" for name, case in cases.items()}
    for name, case in cases.items():
        options = ["--teacher", case.teacher, "--dataset_name", "digits", "--dataset_split", "train[:80]"]
        options += ["--label_column", "label", "--image_mode", "RGB", "--resolution", case.size]
        options += ["--max_train_steps", 2, "--train_batch_size", 4, "--learning_rate", 1e-6, "--sample_every", 0]
        options += ["--output_dir", Path(folders[name]).parent, "--push_to_hub", "--hub_model_id", case.student]
        commands += [*case.commands, ["training.train_ctm", *options]]
        jumps = {"class_labels": ["3", "7"], "sigmas": case.levels[:2], "gamma": 0.0}
        calls |= {case.student: jumps, folders[name]: jumps}
        if case.commands:
            calls[case.teacher] = {"class_labels": case.labels, "num_inference_steps": 1}

    with LoopbackHub() as hub:
        for repo, files in itertools.chain(*(case.files.items() for case in cases.values())):
            hub.repos[f"models/{repo}"] = Repo()
            hub.repos[f"models/{repo}"].commit(files)

        def run(name, pythonpath, *arguments):
            environment = hub.environment(work / f"home-{name}", pythonpath)
            environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, "-c", *arguments]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done

        run("author", ROOT, AUTHOR, json.dumps([list(map(str, command)) for command in commands]))
        users = {}
        for name, pythonpath in (("with", ROOT), ("without", None)):
            done = run(name, pythonpath, USER, name, json.dumps(calls), f"{work}/{name}")
            images, classes = load_file(work / name), json.loads(done.stdout)
            users[name] = SimpleNamespace(images=images, classes=classes, errors=done.stderr)
        repos = {name.removeprefix("models/"): repo.files for name, repo in hub.repos.items()}
    return SimpleNamespace(cases=cases, folders=folders, repos=repos, users=users)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_users_with_and_without_the_package_draw_the_images_of_the_authors_folder(name, shared):
    case, folder = shared.cases[name], shared.folders[name]
    assert shared.repos[case.student][WEIGHTS] == Path(folder, WEIGHTS).read_bytes()
    for user, library in (("with", "diffusers_ctm"), ("without", "diffusers_modules")):
        seen = shared.users[user]
        for kind in ("latent", "pt"):
            expected = shared.users["with"].images[f"{folder} {kind}"]
            assert expected.isfinite().all() and expected.std() > 0.05
            for source in (case.student, folder):
                assert torch.equal(seen.images[f"{source} {kind}"], expected)
        modules, classes = zip(*seen.classes[case.student])
        assert classes == ("CTMPipeline", case.network, "CTMScheduler")
        assert {module.split(".")[0] for module in modules} == {library}
        assert "Expected types" not in seen.errors  # diffusers knows the classes of both


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_student_starts_as_the_network_that_others_made(name, shared):
    """Two short steps of training leave its jumps Euler's steps with their denoiser, and the decoder is theirs."""
    case, images = shared.cases[name], shared.users["without"].images
    states, labels = images[f"{case.student} latent"], torch.tensor(case.labels)
    x = noise = case.levels[0] * torch.randn(states.shape, generator=seeded())
    for t, s in itertools.pairwise(case.levels):
        x = s / t * x + (1 - s / t) * case.denoise(x, t, labels)
    close(states, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    close(images[f"{case.student} pt"], case.shown(states).clamp(0, 1), rtol=0, atol=1e-5)
    if case.commands:  # one step of Heun's method ends in the denoiser
        close(images[f"{case.teacher} latent"], case.denoise(noise, case.levels[0], labels), rtol=1e-5, atol=1e-4)
    weights = load_file(Path(shared.folders[name], WEIGHTS))
    zeros = [key for key in weights if key.endswith(("target_emb_gain", "target_time_embedding.linear_2.bias"))]
    assert zeros and all(weights[key].any() for key in zeros)  # of a new student; training has begun on them


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cards_name_the_origins_and_inherit_their_licenses(name, shared):
    case, commit = shared.cases[name], Repo().sha(1)
    cards = {
        repo: ModelCard(files["README.md"].decode()) for repo, files in shared.repos.items() if "README.md" in files
    }
    for repo in {case.student, case.teacher} - case.files.keys():
        assert cards[repo].data.license == case.license
        assert f"| Images | {case.size}x{case.size} pixels, RGB |\n| Classes | 10 |\n" in cards[repo].content
        if case.vae is not None:
            vae, license = case.vae
            said = (
                f"autoencoder of [{vae}](https://huggingface.co/{vae}), commit `{commit}`, whose license is {license}."
            )
            assert f"It works on the latents of the {said}" in cards[repo].content
    assert cards[case.student].data.base_model == case.teacher
    said = f"Distilled from [{case.teacher}](https://huggingface.co/{case.teacher}), commit `{commit}`."
    assert said in cards[case.student].content and f"The teacher's is {case.license};" in cards[case.student].content
