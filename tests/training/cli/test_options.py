# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Options: YAML below, command line above; what is impossible names its option; shipped files fit their programs."""

import dataclasses
import importlib
import re

import pytest

from diffusers_ctm import CTMScheduler
from helpers.places import ROOT
from training.cli.errors import UserError
from training.cli.options import parse_config, save_config
from training.evaluate import EvaluateConfig
from training.train_ctm import CTMConfig, time_sampler
from training.train_edm import EDMConfig
from training.train_vae import VAEConfig


def refused(config_class, arguments, capsys):
    """What is said when the command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(config_class, arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_command_line_overrides_yaml_which_overrides_defaults(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "teacher: some/repo\nlearning_rate: 1e-3\nmax_train_steps: 7\nema_warmup: true\nmax_solver_steps: 3\n"
    )
    given = ["--config", str(path)]
    config = parse_config(CTMConfig, [*given, "--max_train_steps", "9"])
    assert (config.teacher, config.learning_rate, config.max_train_steps) == ("some/repo", 1e-3, 9)
    assert config.ema_warmup is True and config.matching == "soft" and config.max_solver_steps == 3
    # An empty value takes back what the file says.
    assert parse_config(CTMConfig, [*given, "--max_solver_steps", ""]).max_solver_steps is None
    assert "--learning_rate" in refused(CTMConfig, [*given, "--learning_rate", ""], capsys)  # which is never None
    assert "--teacher is needed" in refused(CTMConfig, [*given, "--teacher="], capsys)


def test_values_of_yaml_are_what_is_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "teacher: 2024-01-02\nteacher_revision: 0123456\nmixed_precision: no\ndataset_config_name: 1.10\n"
        "learning_rate: 1e-3\nema_warmup: yes\ndropout: null\nextra_ema_decays: [0.9, 99e-2]\n"
    )
    config = parse_config(CTMConfig, ["--config", str(path)])
    assert (config.teacher, config.teacher_revision) == ("2024-01-02", "0123456")
    assert (config.mixed_precision, config.dataset_config_name) == ("no", "1.10")
    assert (config.learning_rate, config.ema_warmup, config.dropout) == (1e-3, True, None)
    assert config.extra_ema_decays == [0.9, 0.99]


@pytest.mark.parametrize(
    "config",
    [
        EDMConfig(block_out_channels=[16, 32], attention_levels=[], learning_rate=3e-4, random_flip=True),
        CTMConfig(teacher="folder", objective=["ctm"], matching="local", distance="lpips"),
        CTMConfig(teacher="folder", objective=["ctm"], matching="global"),
    ],
)
def test_saved_options_are_read_again(config, tmp_path):
    save_config(config, str(tmp_path / "config.yaml"))
    again = parse_config(type(config), ["--config", str(tmp_path / "config.yaml")])
    assert dataclasses.replace(again, config=None) == config


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--max_train_steps", "0"], "--max_train_steps must be positive, got 0"),
        (["--max_train_steps", "many"], "max_train_steps"),
        (["--matching", "hard"], "matching"),
        (["--ema_decay", "1.5"], "--ema_decay must be in [0, 1)"),
        (["--extra_ema_decays", "0.9", "1"], "--extra_ema_decays must be in [0, 1)"),
        (["--posthoc_ema", "0.3", "0.1"], "--posthoc_ema must be in (0, 0.288]"),
        (["--posthoc_ema", "0.1"], "--posthoc_ema must be two different widths or more"),
        (["--label_dropout", "1", "--label_column", "label"], "--label_dropout must be in [0, 1)"),
        (["--max_solver_steps", "18"], "--max_solver_steps must be in 1..17"),
        (["--mixed_precision", "fp8"], "mixed_precision"),
        (["--adam_weight_decay", "-1"], "--adam_weight_decay must be 0 or more"),
        (["--seed", "2147483648"], "--seed must be in 0..2147483647, got 2147483648"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--lable_column", "label"], "--lable_column is no option (did you mean --label_column?)."),
        # A part of a name would mean another option as soon as there is a second one that starts so.
        (["--max_train_step=9"], "--max_train_step is no option (did you mean --max_train_steps?)."),
        (["--qqqq", "5"], "--qqqq is no option. See --help for all."),
    ],
)
def test_what_is_impossible_names_the_option_in_two_lines(arguments, said, capsys):
    lines = refused(CTMConfig, ["--teacher", "t", *arguments], capsys)
    assert said in lines and len(lines.splitlines()) <= 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("lerning_rate: 1e-3", "bad.yaml: --lerning_rate is no option (did you mean --learning_rate?)."),
        ("- 1", "option: value"),
        ("a: [", "cannot be read"),
        ("max_train_steps: x", "max_train_steps"),
        ("output_dir: runs/\xfc", "cannot be read: 'utf-8'"),
    ],
)
def test_bad_yaml(tmp_path, text, said, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")  # which is UTF-8 only where all is ASCII
    assert said in refused(CTMConfig, ["--teacher", "t", "--config", str(path)], capsys)


@pytest.mark.parametrize("architecture", ["unet_2d", "ddpmpp"])
def test_a_head_of_attention_is_no_wider_than_its_level(architecture):
    options = {"architecture": architecture, "attention_head_dim": 16}
    EDMConfig(block_out_channels=[8, 16], **options)
    with pytest.raises(UserError, match="--block_out_channels must be multiples"):
        EDMConfig(block_out_channels=[30, 64], **options)
    for wrong in ({"block_out_channels": [16, 8]}, {"block_out_channels": [8, 16], "attention_levels": [0]}):
        with pytest.raises(UserError, match="--attention_head_dim must be at most 8"):
            EDMConfig(**options, **wrong)
    if architecture == "unet_2d":
        EDMConfig(block_out_channels=[16, 8], attention_levels=[0], mid_attention=False, **options)


def test_heads_and_channels_of_edm2():
    """It has no groups, always attention in the middle, and heads that fill the channels of a level."""
    options = {"architecture": "edm2", "attention_head_dim": 6}
    EDMConfig(block_out_channels=[7, 18], **options)
    EDMConfig(block_out_channels=[12, 7, 18], **options, attention_levels=[0])
    for wrong in ([12, 16], [18, 20, 18]):
        with pytest.raises(UserError, match="--attention_head_dim must be a divisor of the --block_out_channels"):
            EDMConfig(block_out_channels=wrong, **options)
    with pytest.raises(UserError, match="--attention_head_dim must be at most 4"):
        EDMConfig(block_out_channels=[12, 4], **options)
    for wrong in ([-12, 12], [0, 12]):
        with pytest.raises(UserError, match="--block_out_channels must be positive"):
            EDMConfig(block_out_channels=wrong, **options)
    for idle in ({"norm_num_groups": 6}, {"mid_attention": False}, {"resnet_time_scale_shift": "default"}):
        with pytest.raises(UserError, match=f"--{next(iter(idle))} is not for --architecture edm2, which has its own"):
            EDMConfig(block_out_channels=[12, 12], **options, **idle)


def test_a_transformer_has_one_width():
    options = {"architecture": "dit", "block_out_channels": [48], "attention_head_dim": 6}
    EDMConfig(**options)
    for wrong in ([48, 48], [64], [18], [0], []):
        with pytest.raises(UserError, match=r"--block_out_channels must be one multiple of 12 \(of attention_head_dim"):
            EDMConfig(**{**options, "block_out_channels": wrong})
    for name, value in {"attention_levels": [0], "mid_attention": False, "norm_num_groups": 4}.items():
        with pytest.raises(UserError, match=f"--{name} is not for --architecture dit, which has"):
            EDMConfig(**options, **{name: value})


PROGRAMS = {  # module: the name of its options' class
    path.stem: found[1]
    for path in sorted((ROOT / "training").glob("*.py"))
    if (found := re.search(r"run_program\(main, (\w+)\)", path.read_text()))
}


def test_help_has_a_heading_for_each_group_of_options(capsys):
    with pytest.raises(SystemExit):
        parse_config(CTMConfig, ["--help"])
    sections = re.split(r"\n(?=\S.*:\n)", capsys.readouterr().out)
    names = {section.splitlines()[0]: re.findall(r"^  --(\w+)", section, re.MULTILINE) for section in sections[1:]}
    assert list(names)[:3] == ["options:", "The teacher:", "The images:"] and names["options:"] == []
    assert names["The teacher:"][0] == "teacher" and names["Denoising score matching:"][0] == "dsm_weight"
    assert sum(names.values(), []) == [field.name for field in dataclasses.fields(CTMConfig)]


@pytest.mark.parametrize("module, name", PROGRAMS.items())
def test_help_says_a_sentence_about_every_option(module, name, capsys):
    config = getattr(importlib.import_module(f"training.{module}"), name)
    with pytest.raises(SystemExit) as stopped:
        parse_config(config, ["--help"])
    assert {"train_edm", "train_ctm", "evaluate", "convert", "publish", "features"} <= set(PROGRAMS)
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert stopped.value.code == 0 and " ".join(config.__doc__.split()) in shown
    for field in dataclasses.fields(config):
        sentence = field.metadata["help"].replace("%%", "%")
        assert sentence.endswith((".", "'.")) and len(sentence) > 10, field.name
        assert f"--{field.name}" in shown and sentence.replace(" ", "") in shown.replace(" ", ""), field.name


SHIPPED = sorted((ROOT / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_options_of_their_program(path):
    if path.stem.endswith("_variants"):  # of training.study, which tests it
        return
    kinds = {"edm": EDMConfig, "vae": VAEConfig, "evaluate": EvaluateConfig}
    kind = kinds.get(path.stem.rpartition("_")[2], CTMConfig)
    config = parse_config(kind, ["--config", str(path)])
    assert config.dataset_name and (kind is not CTMConfig or config.teacher)


def test_shipped_stages_fit_together():
    """A second stage has teacher, data and grid of the first, starts from it and adds the discriminator."""
    for path in SHIPPED:
        if not path.stem.endswith("_adversarial"):
            continue
        second = parse_config(CTMConfig, ["--config", str(path)])
        stage = "_long" if path.stem.startswith("digits") else ""
        first = parse_config(CTMConfig, ["--config", str(path).replace("_adversarial", stage)])
        names = ["teacher", "dataset_name", "label_column", "num_train_timesteps", "inner_target"]
        names += [] if path.stem.startswith("mnist") else ["distance"]  # features first, then pixels
        for name in names:
            assert getattr(first, name) == getattr(second, name), (path.stem, name)
        assert second.discriminator_weight == 1 and first.discriminator_weight == 0
        assert path.stem.startswith("digits") or second.init_from == first.output_dir


# Of the authors' commands, and their code's defaults for what the commands leave out: images of an iteration and of a
# pass, N, M, learning rate, rate of the target's average, other rates, dropout.
CIFAR, IMAGENET = (18, 17, 4e-4), ([0.9999, 0.9999432189950708], None)
AUTHORS = {
    "cifar10_cond_ctm": (256, 16, *CIFAR, 0.999, [0.9999], 0.13),
    "cifar10_uncond_ctm": (256, 16, *CIFAR, 0.999, [0.9999], 0.13),
    "cifar10_cond_ctm_adversarial": (528, 11, *CIFAR, 0.999, [0.9999], 0.13),
    "cifar10_uncond_ctm_adversarial": (528, 11, *CIFAR, 0.9999, [0.999], 0.13),
    "imagenet64_ctm": (1440, 18, 40, 39, 4e-4, 0.999, *IMAGENET),
    "imagenet64_ctm_adversarial": (2112, 11, 40, 20, 8e-6, 0.999, *IMAGENET),
}


@pytest.mark.parametrize("stem", AUTHORS)
def test_the_authors_configs_have_their_numbers(stem):
    config = parse_config(CTMConfig, ["--config", f"training/configs/{stem}.yaml"])
    sampler = time_sampler(config, CTMScheduler())
    assert AUTHORS[stem] == (
        config.train_batch_size * config.gradient_accumulation_steps,
        config.train_batch_size,
        config.num_train_timesteps,
        sampler.most,
        config.learning_rate,
        config.ema_decay,
        config.extra_ema_decays,
        config.dropout,
    )
    assert (config.objective, config.pool_size, sampler.matching, config.optimizer) == (["ctm"], None, "soft", "radam")
    assert (config.adam_beta2, config.adam_weight_decay) == (0.999, 0)
    assert (config.lr_scheduler, config.lr_warmup_steps, config.max_grad_norm) == ("constant_with_warmup", 0, 0)
    assert (config.solver, config.inner_target, config.random_flip, config.ema_warmup) == ("heun", "live", True, False)
    assert (config.dsm_weight, config.dsm_adaptive, config.dsm_sigma) == (1, True, "half_lognormal")
    assert (config.distance, config.distance_network, config.distance_pooling) == ("lpips", "vgg", "average")
    judge = {"period": 2, "start": 0, "channels": 64, "augment": True, "learning_rate": 2e-3}
    assert {name: getattr(config, f"discriminator_{name}") for name in judge} == judge
    if config.discriminator_weight:
        backbones = {"facebook/deit-base-distilled-patch16-224", "efficientnet_lite0"}
        assert set(config.discriminator_backbones) == backbones


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_say_how_long_and_whose_the_result_is(path):
    if path.stem.endswith(("_variants", "_evaluate")):
        return
    words = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\b(minutes?|hours?|days|night)\b|assets/README.md", words), "how long"
    assert re.search(r"[Mm]easured by us|not run by us|assets/README.md", words), "whose"
