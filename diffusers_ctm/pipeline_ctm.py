# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMPipeline: noise to images; its network as a denoiser."""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Number, Real

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .checks import as_number, check_count
from .guidance import GUIDANCE_INPUTS, ClassifierFreeNetwork, Guidance, guided_output
from .hub import component_library, write_loading_code
from .pipeline_output import CTMPipelineOutput
from .preconditioning import Preconditioning
from .provenance import GENERATED, SOFTWARE, _fresh_seeds, _model_and_revision, png_text
from .safety import needs_clip_input, unsafe_images
from .two_times import QuietCastMixin
from .unet_2d_ctm import CTMUNet2DModel
from .unet_edm import EDMUNet2DModel


def _with_components_last(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """`signature` with the parameters `names` last, by keyword only and without a default."""
    parameters = signature.parameters
    components = [
        parameters[name].replace(default=inspect.Parameter.empty, kind=inspect.Parameter.KEYWORD_ONLY) for name in names
    ]
    return signature.replace(parameters=[p for p in parameters.values() if p.name not in names] + components)


class CTMPipeline(QuietCastMixin, DiffusionPipeline):
    """Unconditional and class-conditional image generation in 1 to N network evaluations.

    Args:
        unet: a `CTMUNet2DModel`, or an `EDMUNet2DModel` with target time. With `EDMHeunScheduler` and the like also a denoiser, a plain
            `UNet2DModel` or an `EDMUNet2DModel` without.
        scheduler: `CTMScheduler`. A CTM is a diffusion model too: `EDMHeunScheduler` and (for prediction_type "edm") diffusers'
            `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` sample with its exact score. Build them with
            `from_config(pipe.scheduler.config)`.
        id2label: names of the classes by number, so that `class_labels` may be names. Saved with the pipeline.
        null_class: number of the label that means "no class" in a network trained with label dropout, for `guidance_scale`. It must be the
            last, num_class_embeds - 1, and is not counted as a class. None: there is no such label. Saved with the pipeline.
            A network whose config says label_dropout > 0 (`EDMUNet2DModel`) needs none: its "no class" is a zero vector.
        safety_checker: optional; flags finished images, which are then returned black, whatever the `output_type`. It is called as diffusers'
            `StableDiffusionSafetyChecker` is (see `safety.unsafe_images`): that one, with a `feature_extractor`, or
            `OpenNSFWSafetyChecker`, without. If it fails, the call fails. Callbacks see states, which are not checked.
        feature_extractor: transformers' `CLIPImageProcessor` or the like, for checkers that read its output.
        requires_safety_checker: warn when there is none. Saved with the pipeline. None: if one is given.
        add_provenance: let PIL images carry how they were made, as text in `image.info`, where `save_images` and others find it.
            The output's `provenance` says it in any case.

    A checkpoint may carry schedules of its own for given numbers of steps, `scheduler.config.presets`: `pipe(num_inference_steps=2)`
    uses that for 2 where the call says nothing of levels and gamma.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents"]
    _digital_source_type = GENERATED

    # `from_pipe` compares a network's class with this annotation, subclasses excluded.
    def __init__(
        self,
        unet: UNet2DModel | CTMUNet2DModel | EDMUNet2DModel,
        scheduler,
        id2label: dict[str, str] | dict[int, str] | None = None,
        null_class: int | None = None,
        safety_checker: Callable | None = None,
        feature_extractor: Callable | None = None,
        requires_safety_checker: bool | None = None,
        add_provenance: bool = False,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, safety_checker=safety_checker, feature_extractor=feature_extractor
        )
        if id2label is not None:
            try:
                id2label = {int(index): str(name) for index, name in dict(id2label).items()}
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"id2label must be a dict of names by number of the class, got {id2label!r}."
                ) from error
        if requires_safety_checker is None:
            requires_safety_checker = safety_checker is not None
        self.register_to_config(
            id2label=id2label,
            null_class=null_class,
            requires_safety_checker=requires_safety_checker,
            add_provenance=add_provenance,
        )
        self._check_safety_checker()
        if null_class is not None and null_class != (unet.config.num_class_embeds or 0) - 1:
            raise ValueError(
                f"null_class={null_class!r} must be the last of the network's labels, num_class_embeds - 1 with num_class_embeds = "
                f"{unet.config.num_class_embeds}."
            )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._preconditioning = None
        self._interrupt = False
        self._num_timesteps = 0
        self._seeds = None
        self._match_scheduler()

    # `DiffusionPipeline.from_pretrained(folder, safety_checker=...)` takes for components what has no default in the signature, and drops
    # without a word what is passed for others.
    __init__.__signature__ = _with_components_last(inspect.signature(__init__), _optional_components)

    # Loading and saving ---------------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs):
        # "diffusers_ctm" is the one library name that loads from the Hub with and without the package.
        super().register_to_config(**{name: component_library(value) for name, value in kwargs.items()})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "CTMPipeline":
        """This pipeline with the components and config of another, as `DiffusionPipeline.from_pipe`; the safety checker comes along."""
        for name in cls._optional_components:  # diffusers leaves out models of a class that it did not expect
            kwargs.setdefault(name, getattr(pipeline, name, None))
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, with the code that loads it where this package is missing.

        The folder then serves `import diffusers_ctm; DiffusionPipeline.from_pretrained(folder)` and, without the package,
        `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`.
        """
        save_directory = os.fspath(save_directory)  # push_to_hub=True splits it as a string
        if not save_directory or os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is no folder; pass one.")
        self._match_scheduler()  # a scheduler put in place since is told what it must carry along
        # What was put where there was nothing would not be saved.
        self.register_modules(safety_checker=self.safety_checker, feature_extractor=self.feature_extractor)
        write_loading_code(save_directory, self)
        super().save_pretrained(save_directory, *args, **kwargs)

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_safety_checker(self) -> None:
        """Warn of a checker that is missing; ValueError for one that cannot work."""
        if self.safety_checker is None:
            if self.config.requires_safety_checker:
                logging.get_logger(__name__).warning(
                    f"This checkpoint is meant to be used with a safety checker, and {type(self).__name__} has none: its images are returned "
                    "unchecked. Do not show them to the public. `requires_safety_checker=False` silences this."
                )
        elif needs_clip_input(self.safety_checker) and self.feature_extractor is None:
            raise ValueError(
                f"{type(self.safety_checker).__name__} reads what a feature extractor makes of the images: pass `feature_extractor`, such as "
                "CLIPImageProcessor, or `safety_checker=None`."
            )

    def _match_scheduler(self) -> float:
        """Check that the scheduler belongs to the network; return timestep_scale / the scheduler's own.

        diffusers' EDM schedulers compute ln(sigma) / 4 and call EDM's F "epsilon". `from_config` carries our config values
        along as extra ones, so that a network trained at another scale is still shown what it knows.
        """
        scheduler = self.scheduler
        name = type(scheduler).__name__
        ours = hasattr(scheduler, "preconditioning")
        if not ours and not hasattr(scheduler, "precondition_outputs"):
            raise ValueError(
                f"{name} does not know EDM preconditioning. Use CTMScheduler, EDMHeunScheduler, EDMEulerScheduler or "
                "EDMDPMSolverMultistepScheduler, made with `from_config(pipe.scheduler.config)`."
            )
        if hasattr(scheduler, "target_timesteps") and not getattr(self.unet, "has_target_time", False):
            raise ValueError(
                f"{name} needs a network with two times, and {type(self.unet).__name__} has one. Use "
                "`EDMHeunScheduler.from_config(pipe.scheduler.config)`, or distil the network into a CTM."
            )

        known = self._preconditioning
        if ours:
            # The class of this module: code from a repository has its own.
            current = Preconditioning.from_config(scheduler.config)
            if current.prediction_type == "consistency" and not hasattr(scheduler, "target_timesteps"):
                self._check_score_of_consistency(name)
        else:
            current = self._match_diffusers_scheduler(known)
        if known is not None and current != known:
            has, wanted = f"{name} has {current}", f"{known}"
            if current.prediction_type == known.prediction_type == "edm":
                has = f"{name} has (sigma_data, timestep_scale) = {(current.sigma_data, current.timestep_scale)}"
                wanted = f"{(known.sigma_data, known.timestep_scale)}"
            raise ValueError(
                f"{has}, but this network was loaded with {wanted}. Make the scheduler with "
                f"`{name}.from_config(pipe.scheduler.config)`, or load a new pipeline."
            )
        self._preconditioning = current
        return 1.0 if ours else current.timestep_scale

    def _match_diffusers_scheduler(self, known: Preconditioning | None) -> Preconditioning:
        """The preconditioning that diffusers' EDM scheduler stands for; ValueError if the network's is another.

        It would take what a DDPM calls "epsilon" for EDM's F without a word. It is told what it lacks.
        """
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        config = scheduler.config
        kind = "edm" if known is None else known.prediction_type
        if kind == "edm" and config.get("prediction_type") != "edm":
            has_betas = config.get("beta_schedule") is not None or config.get("trained_betas") is not None
            is_theirs = config.get("prediction_type") in ("epsilon", "v_prediction") and not has_betas
            kind = "edm" if is_theirs else config.get("prediction_type")
        if kind != "edm":
            raise ValueError(
                f"{name} samples EDM networks only, and this one has prediction_type={kind!r}. Use "
                "`EDMHeunScheduler.from_config(pipe.scheduler.config)`, or CTMScheduler for a CTM."
            )
        if config.get("prediction_type") == "edm":
            scheduler.register_to_config(prediction_type="epsilon")
        if "timestep_scale" not in config:
            if known is None:
                raise ValueError(
                    f"This {name} does not say which time the network is shown. Make it with `from_config` of the checkpoint's "
                    "scheduler config, or say it: `scheduler.register_to_config(timestep_scale=1.0)` for NVIDIA's EDM, "
                    "1000.0 for the OpenAI, consistency and CTM family."
                )
            scheduler.register_to_config(timestep_scale=known.timestep_scale)
        return Preconditioning(scheduler.config.sigma_data, scheduler.config["timestep_scale"])

    def _check_score_of_consistency(self, name: str) -> None:
        """Raise ValueError if the network is a consistency model proper: it knows the end of a trajectory and no score."""
        if not getattr(self.unet, "has_target_time", False):
            raise ValueError(
                f"{name} needs a denoiser, and a consistency model is none: its output is the end of the trajectory. Sample it as a CTM: "
                "`CTMPipeline(CTMUNet2DModel.from_unet(unet), CTMScheduler.from_config(scheduler.config))(gamma=1.0)`."
            )

    def _set_timesteps(
        self, num_inference_steps, device, timesteps, sigmas, gamma, target_sigmas=None, final_sigma=None
    ) -> None:
        """Call `set_timesteps` with what was given, checking that this scheduler takes it."""
        options = {"timesteps": timesteps, "sigmas": sigmas, "gamma": gamma}
        options |= {"target_sigmas": target_sigmas, "final_sigma": final_sigma}
        options = {name: value for name, value in options.items() if value is not None}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if not hasattr(self.scheduler, "preconditioning"):
            accepted = ("num_inference_steps",)  # diffusers' EDM schedulers mistake custom levels for a ramp
        for name in options:
            if name not in accepted:
                raise ValueError(f"{type(self.scheduler).__name__} takes no `{name}`; CTMScheduler does.")
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = 1 if "gamma" in accepted else 18
        if num_inference_steps is not None:
            check_count(num_inference_steps=num_inference_steps)  # with 0 diffusers' schedulers would return the noise
            options["num_inference_steps"] = num_inference_steps
        self.scheduler.set_timesteps(device=device, **options)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that can be asked, the null class not counted; None for an unconditional network."""
        num_labels = self.unet.config.num_class_embeds
        return num_labels if num_labels is None or self.config.null_class is None else num_labels - 1

    @property
    def knows_no_class(self) -> bool:
        """Whether the network was trained with label dropout, and so can be told no class, as `guidance_scale` needs."""
        return self.config.null_class is not None or bool(getattr(self.unet.config, "label_dropout", 0.0))

    def _with_null_labels(self, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(class_labels, labels that mean "no class") in the form that the network takes."""
        if self.config.null_class is not None:
            return class_labels, torch.full_like(class_labels, self.config.null_class)
        one_hot = torch.nn.functional.one_hot(class_labels.long(), self.unet.config.num_class_embeds).float()
        return one_hot, torch.zeros_like(one_hot)

    def _guided_network(self, guidance_scale: float, guidance: Guidance | None) -> Callable:
        """The network with classifier-free guidance, if asked; checks both guidances."""
        if guidance is not None:
            methods = (getattr(guidance, name, None) for name in ("loss", "prepare"))
            if getattr(guidance, "on", None) not in GUIDANCE_INPUTS or not all(map(callable, methods)):
                raise ValueError(
                    f"guidance must be an object of a subclass of Guidance, got {type(guidance).__name__}."
                )
            if not hasattr(self.scheduler, "preconditioning"):
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no `guidance`; CTMScheduler and EDMHeunScheduler do."
                )
            if guidance.on == "image" and not getattr(self.unet, "has_target_time", False):
                raise ValueError(
                    f'guidance on the "image" needs a network that jumps, a CTM, and this is a {type(self.unet).__name__}. Use '
                    'on="prediction".'
                )
            guidance.prepare(self.num_classes)
        guidance_scale = as_number(guidance_scale)
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}.")
        if guidance_scale == 1:
            return self.unet
        if self.num_classes is None:
            raise ValueError("guidance_scale was given, but this network is unconditional.")
        if not self.knows_no_class:
            raise ValueError(
                "guidance_scale needs a network trained with label dropout, and this checkpoint names no `null_class`. Guide it by a classifier: "
                "`guidance=ClassifierGuidance(...)`."
            )
        return ClassifierFreeNetwork(self.unet, guidance_scale, self._with_null_labels)

    def get_label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Class numbers for numbers or names of classes. Raises ValueError for a class that does not exist."""
        num_classes = self.num_classes
        if num_classes is None:
            raise ValueError("class_labels were given, but this network is unconditional.")
        labels = labels.tolist() if isinstance(labels, (torch.Tensor, np.ndarray)) else labels
        labels = [labels] if isinstance(labels, (Number, str)) else labels
        if not isinstance(labels, Sequence):
            raise ValueError(f"class_labels must be a number, a name or a list of these, got {labels!r}.")
        id2label = self.config.id2label or {}
        names = {str(name).lower(): int(index) for index, name in id2label.items()}
        ids = []
        for label in labels:
            if isinstance(label, str):
                if label.lower() not in names:
                    known = (
                        ", ".join(sorted(names)) if names else "none: this checkpoint carries no names, pass a number"
                    )
                    raise ValueError(f"class_labels={label!r} is not the name of a class. Known names: {known}.")
                label = names[label.lower()]
            if not isinstance(label, Integral) or isinstance(label, bool):
                raise ValueError(f"class_labels must be whole numbers or names, got {label!r}.")
            if not 0 <= int(label) < num_classes:
                raise ValueError(f"class_labels={label} is not a class; this network knows 0 to {num_classes - 1}.")
            ids.append(int(label))
        return ids

    def _class_labels(self, class_labels, batch_size: int | None, generator, device) -> tuple[torch.Tensor | None, int]:
        """Labels of shape (B,) on `device`, None for an unconditional network, and B."""
        class_labels, batch_size = self._drawn_or_given_labels(class_labels, batch_size, generator, device)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)} for batch_size={batch_size}; pass one or {batch_size}."
            )
        return class_labels, batch_size

    def _drawn_or_given_labels(self, class_labels, batch_size, generator, device) -> tuple[torch.Tensor | None, int]:
        num_classes = self.num_classes
        if class_labels is None:
            batch_size = batch_size or 1
            if num_classes is None:
                return None, batch_size
            drawn = [
                torch.randint(
                    num_classes,
                    (1 if isinstance(generator, list) else batch_size,),
                    generator=g,
                    device=g.device if g else "cpu",
                ).cpu()
                for g in (generator if isinstance(generator, list) else [generator])
            ]
            return torch.cat(drawn).to(device), batch_size
        ids = self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty; pass None for random classes.")
        if len(ids) == 1:
            ids = ids * (batch_size or 1)
        if batch_size is not None and len(ids) != batch_size:
            raise ValueError(
                f"class_labels has {len(ids)} entries for batch_size={batch_size}; pass one or {batch_size}."
            )
        return torch.tensor(ids, device=device), len(ids)

    def prepare_latents(
        self, batch_size: int, device, generator, latents: torch.Tensor | None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The first sample x_T, float32: unit noise times the scheduler's `init_noise_sigma`.

        `size` is height and width for a network whose config has no `sample_size`.
        """
        config = self.unet.config
        size = self._image_size() or size
        if size is None:
            if latents is None:
                raise ValueError("The network's config has no sample_size; pass `latents` of the wanted shape.")
            size = tuple(latents.shape[-2:])
        shape = (batch_size, config.in_channels, *size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        else:
            latents = latents.to(device=device, dtype=torch.float32)
        return latents * self.scheduler.init_noise_sigma

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or last call."""
        return self._num_timesteps

    # The parts of a call ----------------------------------------------------------------------------------------------

    def _check_call(
        self, batch_size, latents, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
    ) -> tuple[int | None, list[str]]:
        """Check what needs no work; return the batch size, None where nothing says it, and the names of the callback's tensors."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        if batch_size is not None:
            check_count(batch_size=batch_size)
            batch_size = int(batch_size)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, got {callback_inputs}."
            )
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
                got = f"shape {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise ValueError(f"latents must be a tensor of shape (B, C, H, W), got {got}.")
            if not latents.isfinite().all():
                raise ValueError("latents hold values that are NaN or infinite.")
            batch_size = batch_size or latents.shape[0]
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(
                f"generator must be a torch.Generator, such as `torch.Generator().manual_seed(0)`, or a list of them, got {generator!r}."
            )
        if isinstance(generator, list):
            if not generator:
                raise ValueError("generator is an empty list; pass one generator, or one per image.")
            batch_size = batch_size or len(generator)
        self._match_scheduler()
        self._seeds = _fresh_seeds(generator)
        return batch_size, callback_inputs

    def _image_size(self) -> tuple[int, int] | None:
        """Height and width of the network's images, None if its config does not say."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    def _batch_size_with(self, given: torch.Tensor, name: str, batch_size: int | None) -> int | None:
        """The batch size where `given`, what is to be edited, has its word; one entry serves any number of images."""
        if len(given) == 1:
            return batch_size
        if batch_size not in (None, len(given)):
            raise ValueError(f"{name} has {len(given)} entries for batch_size={batch_size}; pass one or {batch_size}.")
        return len(given)

    def _sample(
        self, latents, class_labels, callback_on_step_end, callback_inputs, network=None, guidance=None, **step_options
    ) -> torch.Tensor:
        """Run all steps that were set, from the first sample to the last; `step_options` go to `scheduler.step`.

        `network` is called in place of `unet`.
        """
        scheduler, network = self.scheduler, self.unet if network is None else network
        guided, moved = guidance is not None and guidance.scale != 0, []
        timestep_factor, dtype = self._match_scheduler(), self.unet.dtype
        targets = getattr(scheduler, "target_timesteps", None)
        condition = {} if class_labels is None else {"class_labels": class_labels}
        self._interrupt = False
        self._num_timesteps = len(scheduler.timesteps)
        scheduler.set_begin_index(0)  # else it waits for the device to look the first timestep up

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                times = (t * timestep_factor,) if targets is None else (t, targets[i])
                if guided:
                    model_output, any_moved = guided_output(
                        guidance, network, scheduler, latents, t, times, class_labels, dtype
                    )
                    moved.append(any_moved)
                else:
                    model_input = scheduler.scale_model_input(latents, t).to(dtype)
                    model_output = network(model_input, *times, **condition, return_dict=False)[0]
                step = scheduler.step(model_output.to(latents.dtype), t, latents, return_dict=False, **step_options)
                latents = step[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_inputs:
                        callback_kwargs[name] = locals()[name]
                    latents = (callback_on_step_end(self, i, t, callback_kwargs) or {}).get("latents", latents)
                progress_bar.update()
        if moved and not any(moved):
            logging.get_logger(__name__).warning(
                "The gradient of the guidance loss was 0 for every image at every step, so that nothing was guided. The loss is constant where it "
                "was asked: reached already, cut off by clamp or relu, or rounded."
            )
        return latents

    def _finish(
        self, latents, output_type, return_dict, class_labels=None, denormalize: bool = True, **provenance
    ) -> CTMPipelineOutput | tuple:
        """The last sample, in [-1, 1] (with `denormalize=False` in [0, 1]), checked, as the images that were asked for.

        `provenance` replaces what the scheduler says of the run. A tuple holds the images, and with a safety checker its flags.
        """
        latents, flags = self._without_unsafe(latents, denormalize)
        records = self._provenance(len(latents), class_labels, provenance)
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents, output_type, [denormalize] * len(latents))
        if output_type == "pil" and self.config.add_provenance:
            for image, record in zip(images, records):
                image.info.update(png_text(record))
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if flags is None else (images, flags)
        return CTMPipelineOutput(images=images, nsfw_content_detected=flags, provenance=records)

    def _without_unsafe(
        self, images: torch.Tensor, denormalize: bool = True, shown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[bool] | None]:
        """(`images` with those black that the safety checker flags, its flags); (`images`, None) if there is none.

        `images` lie in [-1, 1], with `denormalize=False` in [0, 1]. `shown` is what is checked in their place.
        """
        if self.safety_checker is None:
            return images, None
        self._check_safety_checker()
        shown = images if shown is None else shown
        shown = (shown / 2 + 0.5 if denormalize else shown).clamp(0, 1)
        flags = unsafe_images(self.safety_checker, self.feature_extractor, shown)
        if any(flags):
            logging.get_logger(__name__).warning(
                f"The safety checker flagged {sum(flags)} of {len(flags)} images; they are returned black."
            )
            images = images.clone()
            images[torch.tensor(flags, device=images.device)] = -1.0 if denormalize else 0.0
        return images, flags

    def _provenance(self, count: int, class_labels: torch.Tensor | None, changes: dict) -> list[dict]:
        """How each of `count` images was made, by the names of `provenance.FIELDS`; what is not known is left out."""
        scheduler = self.scheduler
        model, revision = _model_and_revision(self)
        record = {
            "digital_source_type": self._digital_source_type,
            "software": SOFTWARE,
            "model": model,
            "revision": revision,
            "pipeline": type(self).__name__,
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": scheduler.num_inference_steps,
            "gamma": [round(gamma, 6) for gamma in scheduler.gammas.tolist()] if hasattr(scheduler, "gammas") else None,
            "sigmas": [float(f"{sigma:.6g}") for sigma in scheduler.sigmas.tolist()],
            **changes,
        }
        records = []
        for i in range(count):
            own = {"class_label": None if class_labels is None else int(class_labels[i])}
            if isinstance(self._seeds, list):
                own["seed"] = self._seeds[i]
            elif self._seeds is not None:
                own |= {"seed": self._seeds, "batch_index": i, "batch_size": count}
            records.append({name: value for name, value in {**record, **own}.items() if value is not None})
        return records

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        gamma: float | Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        target_sigmas: Sequence[float] | None = None,
        final_sigma: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance: Guidance | None = None,
        guidance_scale: float = 1.0,
    ) -> CTMPipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images. Default: as many as `class_labels`, `latents` or generators, else 1.
            class_labels: class of each image, numbers or (if the checkpoint carries `id2label`) names; one for all or one
                each. Default for a class-conditional network: drawn at random from `generator`.
            num_inference_steps: number of steps N. Default 1 with `CTMScheduler`, else 18. N network evaluations with `CTMScheduler`,
                2N - 1 with `EDMHeunScheduler`. Where the checkpoint's scheduler has a preset for N (`pipe.scheduler.config.presets`, made by
                `training.tune`) and none of the next five is given, its levels and gamma are used.
            gamma: in [0, 1], a number or one per step; 0 is deterministic, 1 is consistency-model multistep. `CTMScheduler` only.
            timesteps: instead of `num_inference_steps`, the c_noise at which each step starts.
            sigmas: instead, the noise level at which each step starts, descending.
            target_sigmas: in place of gamma, the level to which each step jumps before noise leads up to the start of the next.
                `CTMScheduler` only, as the next.
            final_sigma: where the last step ends: sigma_min by default, higher to leave noise in the images, or 0; see
                `CTMScheduler.set_timesteps`.
            generator: source of all noise, or one per image.
            latents: unit normal noise of shape (B, C, H, W) to start from; it is multiplied by `scheduler.init_noise_sigma`.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": what the sampler
                returned, unclipped, float32, images in [-1, 1]. A safety checker checks them all, "latent" too: here these are pixels.
            return_dict: return a `CTMPipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network evaluation; may
                return a dict with new latents.
            callback_on_step_end_tensor_inputs: which tensors it gets; "latents" is all there is.
            guidance: a `ClassifierGuidance`, `LossGuidance` or other `Guidance`, which says what its gradient costs. Every step, in
                `EDMHeunScheduler` every call, is guided. `CTMScheduler` and `EDMHeunScheduler` only.
            guidance_scale: w of classifier-free guidance, g_null + w (g_y - g_null), for checkpoints trained with label dropout. 1 is
                conditional, 0 unconditional, each at the usual cost; others double each network call's batch. Exact in the score; in
                a jump an approximation that gets better with shorter steps (see `ClassifierFreeNetwork`).

        Returns:
            `CTMPipelineOutput` with `images`, or a tuple that holds them and, with a safety checker, its flags.

        Raises:
            ValueError: for arguments that do not fit each other, the network or the scheduler; the message says what to pass.
        """
        # 1. Check
        batch_size, callback_inputs = self._check_call(
            batch_size, latents, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        network = self._guided_network(guidance_scale, guidance)

        # 2. Prepare
        device = self._execution_device
        class_labels, batch_size = self._class_labels(class_labels, batch_size, generator, device)
        self._set_timesteps(num_inference_steps, device, timesteps, sigmas, gamma, target_sigmas, final_sigma)
        latents = self.prepare_latents(batch_size, device, generator, latents)

        # 3. Sample
        latents = self._sample(
            latents, class_labels, callback_on_step_end, callback_inputs, network, guidance, generator=generator
        )

        # 4. Finish
        return self._finish(latents, output_type, return_dict, class_labels)


def pipeline_condition(pipe: CTMPipeline, class_labels, batch_size: int, device) -> dict[str, torch.Tensor]:
    """What the network is called with beside state and time: {"class_labels": (B,)}, or {} for an unconditional one.

    Unlike in sampling, labels are not drawn: a given image has a class. Raises ValueError for labels missing or not expected.
    """
    if class_labels is None and pipe.unet.config.num_class_embeds is not None:
        raise ValueError("This network is class-conditional: pass `class_labels`, the class of each image.")
    labels, _ = pipe._class_labels(class_labels, batch_size, None, device)
    return {} if labels is None else {"class_labels": labels}


def exact_denoiser(pipe: CTMPipeline, **condition) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """D(x, sigma) of a pipeline's network, in the dtype of `x`; the network computes in its own.

    Raises ValueError for a scheduler that does not know the package's preconditioning.
    """
    preconditioning = getattr(pipe.scheduler, "preconditioning", None)
    if preconditioning is None:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} is not of this package. Use `EDMHeunScheduler.from_config(pipe.scheduler.config)`, "
            "or `CTMScheduler` for a CTM."
        )

    dtype = pipe.unet.dtype

    def network(sample, *times, **options):
        return pipe.unet(sample.to(dtype), *times, **options)

    return lambda x, sigma: preconditioning.denoise(network, x, sigma, **condition)
