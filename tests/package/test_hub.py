# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A saved pipeline gives the same image wherever it is loaded: from a folder or the Hub, with this package or without.

The publisher and two users are processes of their own, each with its own cache, and the Hub runs here. They run this
file as a program: `publish`, `without_package` and `with_package`. Each writes what it saw, and the tests compare.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT


LABELS = {0: "zero", 1: "one", 10: "ten"}  # JSON turns the numbers into strings

# What is published, and with which arguments it is loaded
REPOS = {
    "student": {},
    "half": {"variant": "fp16"},
    "sharded": {},
    "teacher": {},
    "euler": {},
    "latent": {},
    "edm2": {},
    "dit": {},
    "pushed": {},
}
FOLDERS = [name for name in REPOS if name != "pushed"]
AGAIN = ["again", "swapped"]  # saved and pushed by the user without the package


# The programs of the processes  ---------------------------------------------------------------------------------------


def randomized(network):
    """`network` with every weight drawn: the image then depends on all of them, those of the target time included."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.eval()


def publish(work: Path) -> dict:
    """With the package: save and push every repo."""
    import torch
    from diffusers import EDMEulerScheduler, UNet2DModel

    from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
    from helpers.autoencoders import make_autoencoder
    from helpers.tiny_networks import make_dit, make_edm2

    size = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    size |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    scheduler = CTMScheduler(timestep_scale=1000.0, sigma_data=0.75)
    student = CTMPipeline(randomized(CTMUNet2DModel(num_class_embeds=11, **size)), scheduler, id2label=LABELS)
    teacher = CTMPipeline(randomized(UNet2DModel(**size)), EDMHeunScheduler(timestep_scale=1000.0, sigma_data=0.75))

    results = {"hub": {}}

    def save(name: str, pipeline: CTMPipeline, **options) -> None:
        pipeline.save_pretrained(work / name, push_to_hub=True, repo_id=f"team/{name}", **options)
        results["hub"][name] = seen(pipeline)

    save("student", student)
    save("sharded", student, max_shard_size="20KB")
    save("teacher", teacher)
    student.push_to_hub("team/pushed")
    results["hub"]["pushed"] = results["hub"]["student"]
    latent = randomized(CTMUNet2DModel(**{**size, "in_channels": 4, "out_channels": 4}))
    vae = make_autoencoder("KL", latents_mean=[0.5, 0.0, -0.25, 1.0], latents_std=[1.0, 2.0, 0.5, 4.0])
    save("latent", CTMPipeline(latent, scheduler, vae=vae, normalize_images=False))
    edm2 = make_edm2(target_time=True, num_class_embeds=11)
    save("edm2", CTMPipeline(edm2, CTMScheduler(), id2label=LABELS), max_shard_size="20KB")
    dit = make_dit(target_time=True, num_class_embeds=12, in_channels=4, out_channels=4)
    epsilon = CTMScheduler(prediction_type="epsilon", beta_schedule="linear", sigma_min=0.02)
    save("dit", CTMPipeline(dit, epsilon, null_class=11, vae=vae))
    save("half", CTMPipeline(student.unet.to(torch.float16), scheduler), variant="fp16")
    teacher.save_pretrained(work / "euler")  # what the swap leaves behind must not matter
    teacher.scheduler = EDMEulerScheduler.from_config(teacher.scheduler.config)
    save("euler", teacher)
    return results


def seen(pipeline) -> dict:
    """What of a pipeline must survive, and where its classes came from."""
    import torch

    options = {"num_inference_steps": 3}
    if hasattr(pipeline.scheduler, "target_timesteps"):
        options["gamma"] = 0.5
    if pipeline.unet.config.num_class_embeds:
        options["class_labels"] = ["ten", "zero"] if pipeline.config.id2label else [10, 0]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    shown = "latent" if pipeline.vae is None else "pt"
    image = pipeline(batch_size=2, generator=generator, output_type=shown, **options).images
    assert image.isfinite().all() and image.std() > 0.01, image
    scheduler = pipeline.scheduler
    return {
        "kept": {
            "image": hashlib.sha256(image.numpy().tobytes()).hexdigest(),
            "id2label": repr(pipeline.config.id2label),
            "scheduler": [type(scheduler).__name__, scheduler.config.sigma_data, scheduler.config["timestep_scale"]],
            "dtype": str(pipeline.unet.dtype),
        },
        "modules": [type(part).__module__ for part in (pipeline, pipeline.unet, scheduler)],
    }


def attempt(function, *args, **kwargs):
    """The result of `function`, or its error as a string."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load_all(work: Path, names: list[str], folders: list[str], trust: bool) -> dict:
    """Load repos and folders as a user does, with the code that they carry (`trust`) or with the package."""
    import torch
    from diffusers import DiffusionPipeline

    def load(source: str, name: str) -> dict:
        options = dict(REPOS.get(name, {}))
        if "variant" in options:
            options["dtype"] = torch.float16
        if trust:
            options |= {"custom_pipeline": source, "trust_remote_code": True}
        return seen(DiffusionPipeline.from_pretrained(source, **options))

    return {
        "hub": {name: attempt(load, f"team/{name}", name) for name in names},
        "folder": {name: attempt(load, str(work / name), name) for name in folders},
    }


def without_package(work: Path) -> dict:
    """Without the package: be refused, load everything, save and push again, also with another scheduler."""
    from diffusers import DiffusionPipeline, EDMEulerScheduler

    refusals = {}
    for source in ("team/trap", str(work / "trap")):
        for options in ({}, {"custom_pipeline": source}):
            answer = attempt(DiffusionPipeline.from_pretrained, source, **options)
            refusals[f"{'hub' if source == 'team/trap' else 'folder'}, {'code' if options else 'plain'}"] = answer
    code_ran = [(work / "trap_ran").exists(), any("diffusers_modules" in name for name in sys.modules)]

    results = load_all(work, list(REPOS), FOLDERS, trust=True)
    results |= {"refusals": refusals, "code_ran": code_ran}

    def save_again() -> dict:
        source = "team/student"
        pipeline = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)
        # Other code, loaded in between from a folder, must not change what the student saves.
        trap = str(work / "trap")
        DiffusionPipeline.from_pretrained(trap, custom_pipeline=trap, trust_remote_code=True)
        results["trap_works"] = (work / "trap_ran").exists()
        (work / "trap_ran").unlink(missing_ok=True)
        pipeline.save_pretrained(work / "again", push_to_hub=True, repo_id="team/again")

        pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(work / "swapped", push_to_hub=True, repo_id="team/swapped")
        return seen(pipeline)

    results["swapped"] = attempt(save_again)
    again = load_all(work, AGAIN, AGAIN, trust=True)
    return results | {place: results[place] | again[place] for place in again}


def with_package(work: Path) -> dict:
    """With the package and no trust: load everything, and components alone."""
    import torch
    from diffusers import AutoModel, EDMEulerScheduler

    import diffusers_ctm

    results = load_all(work, [*REPOS, *AGAIN, "trap"], [*FOLDERS, *AGAIN, "trap"], trust=False)
    results["code_ran"] = [(work / "trap_ran").exists(), any("diffusers_modules" in name for name in sys.modules)]

    def alone() -> dict:
        unet = AutoModel.from_pretrained("team/student", subfolder="unet")
        weights = diffusers_ctm.CTMPipeline.from_pretrained("team/student").unet.state_dict()
        scheduler = diffusers_ctm.CTMScheduler.from_pretrained("team/student", subfolder="scheduler")
        heun = diffusers_ctm.EDMHeunScheduler.from_pretrained("team/student", subfolder="scheduler")
        back = diffusers_ctm.CTMScheduler.from_config(EDMEulerScheduler.from_config(scheduler.config).config)
        return {
            "unet": [
                type(unet).__name__,
                all(torch.equal(value, weights[k]) for k, value in unet.state_dict().items()),
            ],
            "schedulers": [[s.config.sigma_data, s.config.timestep_scale] for s in (scheduler, heun, back)],
            "compatibles": sorted(cls.__name__ for cls in scheduler.compatibles),
        }

    results["alone"] = attempt(alone)
    results["mixed"] = load_all(work, ["student"], ["student"], trust=True)  # with the package, and trust as well
    return results


# Running them  --------------------------------------------------------------------------------------------------------


def run(program: str, hub: LoopbackHub, work: Path, package: bool) -> dict:
    """What `program` saw, run in a process that can import the package or cannot."""
    paths = [ROOT / "tests", ROOT] if package else [ROOT / "tests"]
    env = hub.environment(work / f"home_{program}", pythonpath=os.pathsep.join(map(str, paths)))
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, program, str(work), "package" if package else "no package"]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((work / f"{program}.json").read_text())


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What each program saw, by its name, and the files of the Hub's repos at the end."""
    work = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        results = {"publish": run("publish", hub, work, package=True)}

        trap = f"import pathlib\n\npathlib.Path({str(work / 'trap_ran')!r}).touch()\n".encode()
        files = dict(hub.repos["models/team/student"].files)
        files = {path: trap + content if path.endswith(".py") else content for path, content in files.items()}
        hub.repos["models/team/trap"] = Repo()
        hub.repos["models/team/trap"].commit(files)
        for path, content in files.items():
            (work / "trap" / path).parent.mkdir(parents=True, exist_ok=True)
            (work / "trap" / path).write_bytes(content)

        results["without_package"] = run("without_package", hub, work, package=False)
        results["with_package"] = run("with_package", hub, work, package=True)
        results["repos"] = {name.removeprefix("models/team/"): repo.files for name, repo in hub.repos.items()}
        return results


# Loading  -------------------------------------------------------------------------------------------------------------

PLACES = [("hub", name) for name in REPOS] + [("folder", name) for name in FOLDERS]


@pytest.mark.parametrize("place,name", PLACES)
@pytest.mark.parametrize("user", ["with_package", "without_package"])
def test_every_user_sees_the_same_image(session, user, place, name):
    loaded = session[user][place][name]
    assert isinstance(loaded, dict), loaded
    assert loaded["kept"] == session["publish"]["hub"][name]["kept"]


@pytest.mark.parametrize("place", ["hub", "folder"])
@pytest.mark.parametrize("user", ["with_package", "without_package"])
def test_saved_again_without_the_package(session, user, place):
    assert isinstance(session["without_package"]["swapped"], dict), session["without_package"]["swapped"]
    truth = {"again": session["publish"]["hub"]["student"], "swapped": session["without_package"]["swapped"]}
    assert truth["swapped"]["kept"]["scheduler"] == ["EDMEulerScheduler", 0.75, 1000.0]
    for name in AGAIN:
        loaded = session[user][place][name]
        assert isinstance(loaded, dict), loaded
        assert loaded["kept"] == truth[name]["kept"]


def test_names_of_classes_keep_their_numbers(session):
    for user in ("publish", "with_package", "without_package"):
        assert session[user]["hub"]["student"]["kept"]["id2label"] == repr(LABELS)
    assert session["with_package"]["hub"]["half"]["kept"]["id2label"] == "None"


def test_classes_come_from_the_package_or_from_the_repo(session):
    packaged = ["diffusers_ctm.pipeline_ctm", "diffusers_ctm.unet_2d_ctm", "diffusers_ctm.scheduling_ctm"]
    assert session["with_package"]["hub"]["student"]["modules"] == packaged
    assert session["with_package"]["folder"]["student"]["modules"] == packaged
    for place in ("hub", "folder"):
        modules = session["without_package"][place]["student"]["modules"]
        assert all(module.startswith("diffusers_modules.local.") for module in modules)
        mixed = session["with_package"]["mixed"][place]["student"]
        assert mixed["modules"][0].startswith("diffusers_modules.") and mixed["modules"][1:] == packaged[1:]
        assert mixed["kept"] == session["publish"]["hub"]["student"]["kept"]


def test_half_precision_variant_is_loaded_as_such(session):
    files = session["repos"]["half"]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert "unet/diffusion_pytorch_model.safetensors" not in files
    assert session["publish"]["hub"]["half"]["kept"]["dtype"] == "torch.float16"


def test_sharded_weights_are_sharded(session):
    for name in ("sharded", "edm2"):
        assert sum(path.endswith(".safetensors") for path in session["repos"][name]) > 2


def test_swapped_scheduler_is_diffusers_own_and_keeps_the_time_scale(session):
    index = json.loads(session["repos"]["euler"]["model_index.json"])
    assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert session["with_package"]["hub"]["euler"]["kept"]["scheduler"] == ["EDMEulerScheduler", 0.75, 1000.0]


def test_components_alone(session):
    alone = session["with_package"]["alone"]
    assert isinstance(alone, dict), alone
    assert alone["unet"] == ["CTMUNet2DModel", True]
    assert alone["schedulers"] == [[0.75, 1000.0]] * 3
    known = ["CTMScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EDMHeunScheduler"]
    assert alone["compatibles"] == known


# What is not run  -----------------------------------------------------------------------------------------------------


def test_without_trust_and_package_diffusers_refuses_and_no_code_runs(session):
    for place in ("hub", "folder"):
        refusals = session["without_package"]["refusals"]
        assert refusals[f"{place}, plain"] == "AttributeError: module diffusers has no attribute CTMPipeline"
        refusal = refusals[f"{place}, code"]
        assert refusal.startswith("ValueError") and "Pass `trust_remote_code=True`" in refusal
    assert session["without_package"]["trap_works"]
    assert session["without_package"]["code_ran"] == [False, False]


def test_with_the_package_no_code_of_a_repo_runs(session):
    for place in ("hub", "folder"):
        assert session["with_package"][place]["trap"]["kept"] == session["publish"]["hub"]["student"]["kept"]
    assert session["with_package"]["code_ran"] == [False, False]


# What is written  -----------------------------------------------------------------------------------------------------


def test_files_of_a_repo(session):
    index = json.loads(session["repos"]["student"]["model_index.json"])
    assert index["_class_name"] == "CTMPipeline"
    assert index["unet"] == ["diffusers_ctm", "CTMUNet2DModel"]
    assert index["scheduler"] == ["diffusers_ctm", "CTMScheduler"]
    code = {path: content for path, content in session["repos"]["student"].items() if path.endswith(".py")}
    assert sorted(code) == ["pipeline.py", "scheduler/diffusers_ctm.py", "unet/diffusers_ctm.py"]
    assert len(set(code.values())) == 1
    assert sorted(path for path in session["repos"]["teacher"] if path.endswith(".py")) == [
        "pipeline.py",
        "scheduler/diffusers_ctm.py",
    ]
    for files in session["repos"].values():  # loading a variant splits every name at its dot
        assert all("." in Path(path).name for path in files)


def test_code_written_by_the_code_is_identical(session):
    again, student = session["repos"]["again"], session["repos"]["student"]
    assert {path for path in again if path.endswith(".py")} == {path for path in student if path.endswith(".py")}
    assert all(again[path] == student[path] for path in again if path.endswith(".py"))
    assert json.loads(again["model_index.json"])["unet"] == ["diffusers_ctm", "CTMUNet2DModel"]


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """The written file, and the module that it is when run."""
    import diffusers_ctm
    from diffusers_ctm.hub import bundle

    path = tmp_path_factory.mktemp("bundle") / "ctm_in_one_file.py"
    path.write_text(bundle(diffusers_ctm.CTMPipeline))
    yield path, run_file(path)
    del sys.modules[path.stem]


def run_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_file_needs_only_torch_and_what_diffusers_needs(one_file):
    import ast

    from diffusers.utils.dynamic_modules_utils import check_imports

    path, _ = one_file
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "numpy", "PIL", "diffusers"}
    assert check_imports(path) == []  # diffusers reads the text, docstrings included


def test_one_file_defines_every_public_class_and_one_pipeline(one_file):
    from diffusers import DiffusionPipeline
    from diffusers.utils.dynamic_modules_utils import find_pipeline_class

    import diffusers_ctm
    from diffusers_ctm.hub import public_classes

    _, module = one_file
    assert {"CTMPipeline", "CTMScheduler", "CTMUNet2DModel", "EDMHeunScheduler"} <= set(public_classes())
    for name, cls in public_classes().items():
        if issubclass(cls, DiffusionPipeline) and cls is not diffusers_ctm.CTMPipeline:
            assert not hasattr(module, name)  # each pipeline has a file of its own
            continue
        assert getattr(module, name) is not cls
        assert getattr(module, name).__doc__ == cls.__doc__
    assert find_pipeline_class(module) is module.CTMPipeline
    assert module.CTMPipeline is not diffusers_ctm.CTMPipeline


@pytest.mark.parametrize("name", ["CTMImg2ImgPipeline", "CTMInpaintPipeline", "CTMInversionPipeline"])
def test_every_pipeline_fits_in_one_file(name, tmp_path):
    from diffusers.utils.dynamic_modules_utils import check_imports, find_pipeline_class

    import diffusers_ctm
    from diffusers_ctm.hub import bundle

    path = tmp_path / f"{name.lower()}_in_one_file.py"
    path.write_text(bundle(getattr(diffusers_ctm, name)))
    module = run_file(path)
    del sys.modules[path.stem]
    assert find_pipeline_class(module) is getattr(module, name) is not getattr(diffusers_ctm, name)
    assert check_imports(path) == []


def test_the_modules_fit_in_one_namespace():
    """What `bundle` cannot express: two meanings of one name, relative imports that are renamed or not at the top."""
    import ast

    import diffusers_ctm

    meanings: dict[str, set[str]] = {}
    for path in Path(diffusers_ctm.__file__).parent.glob("[a-z]*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node in tree.body and node.level == 1 and node.module, (path.name, node.lineno)
                assert not any(alias.asname for alias in node.names), (path.name, node.lineno)
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                source = getattr(node, "module", None)
                names = (
                    {} if getattr(node, "level", 0) else {a.asname or a.name: f"{source} {a.name}" for a in node.names}
                )
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = {node.name: path.name}
            else:
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                names = {name.id: path.name for name in stored}
            for name, meaning in names.items():
                meanings.setdefault(name, set()).add(meaning)
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}


# Registration  --------------------------------------------------------------------------------------------------------


def test_registration_is_idempotent():
    import diffusers

    import diffusers_ctm
    from diffusers_ctm.hub import public_classes

    before = {name: getattr(diffusers, name) for name in public_classes()}
    diffusers_ctm.register()
    assert {name: getattr(diffusers, name) for name in public_classes()} == before == public_classes()
    assert diffusers.pipelines.diffusers_ctm is diffusers_ctm


def test_registration_replaces_nothing_of_diffusers(monkeypatch):
    import diffusers

    import diffusers_ctm

    theirs = type("CTMScheduler", (), {"__module__": "diffusers.schedulers.scheduling_ctm"})
    monkeypatch.setattr(diffusers, "CTMScheduler", theirs)
    diffusers_ctm.register()
    assert diffusers.CTMScheduler is theirs
    assert diffusers.CTMPipeline is diffusers_ctm.CTMPipeline
    assert diffusers.UNet2DModel.__module__.startswith("diffusers.")


if __name__ == "__main__":
    name, folder, package = sys.argv[1:]
    if package == "no package":
        sys.modules["diffusers_ctm"] = None  # not even an installed one can be imported
    os.environ["TQDM_DISABLE"] = "1"
    (Path(folder) / f"{name}.json").write_text(json.dumps(globals()[name](Path(folder))))
