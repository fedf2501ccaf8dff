# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMPipeline: noise to images; its network as a denoiser."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .autoencoder import decode, downscale, encode, for_gradients, latent_channels
from .checks import called_back, check_callback, check_count, check_finite, check_output_type, sum_of
from .class_labels import label_ids, labels_and_batch_size, null_labels
from .guidance import ClassifierFreeNetwork, Guidance, check_guidance, check_guidance_scale, guided_output
from .hub import component_library, remove_weights_loaded_first, with_copies, write_loading_code
from .pipeline_output import CTMPipelineOutput
from .preconditioning import PREDICTIONS, Preconditioning, condition, has_betas
from .provenance import GENERATED, fresh_seeds, png_text, run_records
from .runs import own_run, runs_of, show_run
from .safety import check_safety_checker, without_unsafe
from .scheduling_karras import default_num_steps, jumps, preconditioning_of
from .transformer_dit_ctm import CTMDiTTransformer2DModel
from .two_times import image_size, input_dtype, input_weight
from .unet_2d_ctm import CTMUNet2DModel
from .unet_edm import EDMUNet2DModel
from .unet_edm2 import EDM2UNet2DModel


KEEP_DTYPE = "keep"  # a dtype for `CTMPipeline.to` that changes nothing


def _with_components_last(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """`signature` with the parameters `names` last, by keyword only and without a default."""
    component = {"default": inspect.Parameter.empty, "kind": inspect.Parameter.KEYWORD_ONLY}
    parameters = [p.replace(**component) if p.name in names else p for p in signature.parameters.values()]
    return signature.replace(parameters=sorted(parameters, key=lambda p: p.kind))


@functools.cache
def _signature_keys(cls: type, pipeline_class: type) -> tuple[list[str], list[str]]:
    """Names of the components of a pipeline, and of its other arguments, as diffusers finds them."""
    return super(CTMPipeline, cls)._get_signature_keys(pipeline_class)


class CTMPipeline(DiffusionPipeline):
    """Unconditional and class-conditional image generation in 1 to N network evaluations.

    Args:
        unet: a `CTMUNet2DModel`, or an `EDMUNet2DModel`, `EDM2UNet2DModel` or `CTMDiTTransformer2DModel` with target
            time. With `EDMHeunScheduler` and the like also a denoiser, a plain `UNet2DModel` or one of the others
            without.
        scheduler: `CTMScheduler`. A CTM is a diffusion model too: `EDMHeunScheduler` and (for prediction_type "edm")
            diffusers' `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` sample with its exact score. Build them
            with `from_config(pipe.scheduler.config)`.
        id2label: names of the classes by number, so that `class_labels` may be names. Saved with the pipeline.
        null_class: number of the label that means "no class" in a network trained with label dropout, for
            `guidance_scale`. It must be the last, num_class_embeds - 1, and is not counted as a class. None: there is
            no such label. Saved with the pipeline. A network whose config says label_dropout > 0 (`EDMUNet2DModel`)
            needs no such label: its "no class" is a zero vector.
        trained_classes: numbers of the classes that had images in training, None for all. Random classes are drawn from
            these, and asking for another is warned of. Saved with the pipeline.
        safety_checker: optional; flags finished images, which are then returned black, whatever the `output_type`. It
            is called as diffusers' `StableDiffusionSafetyChecker` is (see `safety.unsafe_images`): that one, with a
            `feature_extractor`, or `OpenNSFWSafetyChecker`, without. If it fails, the call fails. Callbacks see states,
            which are not checked.
        feature_extractor: transformers' `CLIPImageProcessor` or the like, for checkers that read its output.
        vae: optional; an image autoencoder of diffusers, such as `AutoencoderKL`, for a network of its latents, which
            are scaled and shifted as its config says. Images are then decoded and encoded by it; states of the sampler,
            `latents` and noise levels are of latents.
        normalize_images: whether `vae` works on images in [-1, 1], as diffusers' do. False: in [0, 1] (EDM2's). Saved
            with the pipeline.
        requires_safety_checker: warn when there is no checker. Saved with the pipeline. None: if one is given.
        add_provenance: let PIL images carry how they were made, as text in `image.info`, where `save_images` and others
            find it. The output's `provenance` says it in any case.

    A checkpoint may carry schedules of its own for given numbers of steps, `scheduler.config.presets`:
    `pipe(num_inference_steps=2)` uses that for 2 where the call says nothing of levels and gamma.

    Several threads may call one pipeline, each with its own generator: a call runs on a copy of the pipeline, with a
    scheduler of its own, and callbacks are given that copy. `pipe.scheduler` shows the schedule of the last call. A
    `pipe._interrupt = True` on the pipeline itself stops all its calls. Networks and checkers are shared: do not move
    them meanwhile, which `enable_model_cpu_offload` does after each call.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "vae"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents"]
    _digital_source_type = GENERATED

    # `from_pipe` compares a network's class with this annotation, subclasses excluded.
    def __init__(
        self,
        unet: UNet2DModel | CTMUNet2DModel | EDMUNet2DModel | EDM2UNet2DModel | CTMDiTTransformer2DModel,
        scheduler,
        id2label: dict[str, str] | dict[int, str] | None = None,
        null_class: int | None = None,
        safety_checker: Callable | None = None,
        feature_extractor: Callable | None = None,
        requires_safety_checker: bool | None = None,
        add_provenance: bool = False,
        trained_classes: Sequence[int] | None = None,
        vae: Callable | None = None,
        normalize_images: bool = True,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, safety_checker=safety_checker, feature_extractor=feature_extractor, vae=vae
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
            trained_classes=None if trained_classes is None else list(trained_classes),
            normalize_images=normalize_images,
        )
        check_safety_checker(self)
        if isinstance(unet, DiTTransformer2DModel):
            raise ValueError(
                "A DiTTransformer2DModel predicts variances and takes whole timesteps only. Pass "
                "`CTMDiTTransformer2DModel.from_unet(unet, target_time=False)`, with EDMHeunScheduler."
            )
        self._check_vae()
        if null_class is not None and null_class != (unet.config.num_class_embeds or 0) - 1:
            raise ValueError(
                f"null_class={null_class!r} must be the last of the network's labels, num_class_embeds - 1 with "
                f"num_class_embeds = {unet.config.num_class_embeds}."
            )
        unknown = set(self.config.trained_classes or []) - set(range(self.num_classes or 0))
        if unknown or trained_classes is not None and not self.config.trained_classes:
            raise ValueError(
                f"trained_classes={trained_classes!r} must hold classes of the network, which has {self.num_classes}."
            )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._preconditioning = None
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._seeds = None
        self._guided_by = {}
        self._match_scheduler()

    # `DiffusionPipeline.from_pretrained(folder, safety_checker=...)` reads this signature. It takes the parameters
    # without a default for components, and silently drops a component that is passed for another parameter.
    __init__.__signature__ = _with_components_last(inspect.signature(__init__), _optional_components)

    # Loading and saving ---------------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs):
        # "diffusers_ctm" is the one library name that loads from the Hub with and without the package.
        super().register_to_config(**{name: component_library(value) for name, value in kwargs.items()})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "CTMPipeline":
        """This pipeline with the components and config of another, its safety checker included.

        The components are shared. They keep their precision, unless `dtype` is given.
        """
        for name in cls._optional_components:  # diffusers leaves out models of a class that it did not expect
            kwargs.setdefault(name, getattr(pipeline, name, None))
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:  # diffusers would take float32
            kwargs["dtype"] = KEEP_DTYPE if kwargs.get("custom_pipeline") is None else pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)

    @functools.wraps(DiffusionPipeline.to)
    def to(self, *args, **kwargs):
        return self if kwargs.get("dtype") == KEEP_DTYPE else super().to(*args, **kwargs)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name in ("_interrupt", "_guidance_scale"):  # reaches the calls that run now
            for own in runs_of(self):
                setattr(own, name, value)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        *args,
        **kwargs,
    ) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, with the code that loads it where this package is missing.

        The folder then serves `import diffusers_ctm; DiffusionPipeline.from_pretrained(folder)` and, without the
        package, `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`.
        """
        save_directory = os.fspath(save_directory)  # push_to_hub=True splits it as a string
        if not save_directory or os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is not a folder; pass one.")
        self._match_scheduler()  # a scheduler that was swapped in is told what it must carry along
        # diffusers does not save a component that was set after loading, unless it is registered.
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})
        write_loading_code(save_directory, self)
        for name, component in self.components.items():
            if isinstance(component, ModelMixin):
                remove_weights_loaded_first(os.path.join(save_directory, name), safe_serialization, variant)
        super().save_pretrained(save_directory, safe_serialization, variant, *args, **kwargs)

    @classmethod
    def _get_signature_keys(cls, obj) -> tuple[list[str], list[str]]:
        # diffusers reads the signature of `__init__` anew in each call.
        components, options = _signature_keys(cls, obj if isinstance(obj, type) else type(obj))
        return list(components), list(options)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        types = super()._get_signature_types()
        return {**types, "unet": with_copies(types["unet"])}  # diffusers warns of others

    # Checks ---------------------------------------------------------------------------------------------------------

    def _match_scheduler(self) -> float:
        """Check that the scheduler belongs to the network; return timestep_scale / the scheduler's own.

        diffusers' EDM schedulers compute ln(sigma) / 4 and call EDM's F "epsilon". `from_config` carries our config
        values along as extra ones, so that a network trained at another scale is still shown what it knows.
        """
        scheduler = self.scheduler
        name, network = type(scheduler).__name__, type(self.unet).__name__
        ours, has_target_time = preconditioning_of(scheduler) is not None, getattr(self.unet, "has_target_time", False)
        if not ours and not hasattr(scheduler, "precondition_outputs"):
            raise ValueError(
                f"{name} does not know EDM preconditioning. Use CTMScheduler, EDMHeunScheduler, EDMEulerScheduler or "
                "EDMDPMSolverMultistepScheduler, made with `from_config(pipe.scheduler.config)`."
            )
        if jumps(scheduler) and not has_target_time:
            raise ValueError(
                f"{name} needs a network with two times, and {network} has one. Use "
                "`EDMHeunScheduler.from_config(pipe.scheduler.config)`, or distill the network into a CTM."
            )

        loaded = self._preconditioning
        if ours:
            # The class of this module: code from a repository has its own.
            current = Preconditioning.from_config(scheduler.config)
            if not (current.kind.is_denoiser or has_target_time):
                raise ValueError(
                    f"{name} needs a denoiser. The output of a consistency model is the end of the trajectory. Sample "
                    "it as a CTM: `CTMPipeline(CTMUNet2DModel.from_unet(unet), "
                    "CTMScheduler.from_config(scheduler.config))(gamma=1.0)`."
                )
        else:
            current = self._match_diffusers_scheduler(loaded)
        if loaded is not None and current != loaded:
            raise ValueError(
                f"{name} has {current}, but this network was loaded with {loaded}. Make the scheduler with "
                f"`{name}.from_config(pipe.scheduler.config)`, or load a new pipeline."
            )
        self._preconditioning = current
        return 1.0 if ours else current.timestep_scale

    def _match_diffusers_scheduler(self, loaded: Preconditioning | None) -> Preconditioning:
        """The preconditioning that diffusers' EDM scheduler stands for; ValueError if the network's is another.

        It would silently take the "epsilon" of a DDPM for EDM's F. It is told what it lacks.
        """
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        config = scheduler.config
        edm, said = PREDICTIONS["edm"], config.get("prediction_type")
        if said in ("epsilon", "v_prediction") and not has_betas(config):  # as diffusers calls F and -F
            said = edm.name
        said = said if loaded is None or loaded.kind is edm else loaded.prediction_type
        if said != edm.name:
            raise ValueError(
                f"{name} samples EDM networks only, and this one has prediction_type={said!r}. Use "
                "`EDMHeunScheduler.from_config(pipe.scheduler.config)`, or CTMScheduler for a CTM."
            )
        if config.get("prediction_type") == edm.name:
            scheduler.register_to_config(prediction_type=edm.edm_scheduler_type)
        if "timestep_scale" not in config:
            if loaded is None:
                raise ValueError(
                    f"This {name} does not say which time the network is shown. Make it with `from_config` of the "
                    "checkpoint's scheduler config, or say it: `scheduler.register_to_config(timestep_scale=1.0)` for "
                    "NVIDIA's EDM, 1000.0 for the OpenAI, consistency and CTM family."
                )
            scheduler.register_to_config(timestep_scale=loaded.timestep_scale)
        return Preconditioning(scheduler.config.sigma_data, scheduler.config["timestep_scale"])

    def set_timesteps(self, device=None, num_inference_steps: int | None = None, **schedule) -> None:
        """Call the scheduler's `set_timesteps` with what was given.

        `schedule` holds the arguments of `CTMScheduler.set_timesteps`; None counts as not given. Raises ValueError for
        one that this scheduler does not take.
        """
        schedule = {name: value for name, value in schedule.items() if value is not None}
        # diffusers' EDM schedulers would take custom levels for a ramp.
        unknown = [name for name in schedule if name not in getattr(self.scheduler, "schedule_options", ())]
        if unknown:
            raise ValueError(f"{type(self.scheduler).__name__} takes no `{unknown[0]}`; CTMScheduler does.")
        if num_inference_steps is None and not schedule.keys() & {"timesteps", "sigmas"}:
            num_inference_steps = default_num_steps(self.scheduler)
        if num_inference_steps is not None:
            check_count(num_inference_steps=num_inference_steps)  # with 0 diffusers' schedulers would return the noise
            schedule["num_inference_steps"] = num_inference_steps
        self.scheduler.set_timesteps(device=device, **schedule)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that can be asked, the null class not counted; None for an unconditional network."""
        num_labels = self.unet.config.num_class_embeds
        return num_labels if num_labels is None or self.config.null_class is None else num_labels - 1

    @property
    def classes(self) -> list[int] | None:
        """Numbers of the classes that the network was trained on; None for an unconditional network."""
        return self.config.trained_classes or (None if self.num_classes is None else list(range(self.num_classes)))

    @property
    def knows_no_class(self) -> bool:
        """Whether the network can be told no class, as `guidance_scale` needs: it was trained with label dropout."""
        return self.config.null_class is not None or bool(getattr(self.unet.config, "label_dropout", 0.0))

    @property
    def state_size(self) -> tuple[int, int] | None:
        """Height and width of what the network sees, None if its config does not say."""
        return image_size(self.unet)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels, None if the network's config does not say."""
        size, factor = self.state_size, 1 if self.vae is None else downscale(self.vae)
        return size and tuple(factor * side for side in size)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.in_channels if self.vae is None else self.vae.config.in_channels

    def _check_vae(self, output_type: str = "latent") -> None:
        """Raise ValueError if the autoencoder's latents are not what the network sees, or images would need one."""
        channels = self.unet.config.in_channels
        if self.vae is None and output_type != "latent" and channels not in (1, 3):
            raise ValueError(
                f"The network makes {channels} channels, which are latents, and their autoencoder is missing. Pass it "
                "to `from_pretrained` as `vae`, or ask for output_type='latent'."
            )
        if self.vae is not None and latent_channels(self.vae) != channels:
            raise ValueError(
                f"vae makes latents with {latent_channels(self.vae)} channels, and the network sees {channels}. Pass "
                "the autoencoder that it was trained with."
            )

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """The states at level 0 of images in [0, 1] of shape (B, C, H, W): in [-1, 1], or with `vae` their latents."""
        images = 2 * images.to(self._execution_device) - 1
        if self.vae is None:
            return images
        factor = downscale(self.vae)
        if any(side % factor for side in images.shape[-2:]):
            raise ValueError(
                f"The image is {images.shape[2]}x{images.shape[3]} pixels; the autoencoder takes multiples of {factor}."
            )
        return encode(self.vae, images, self.config.normalize_images)

    def decode_states(self, states: torch.Tensor) -> torch.Tensor:
        """The images in about [-1, 1] of states at level 0: with `vae` they are decoded, else they are the images."""
        return states if self.vae is None else decode(self.vae, states, self.config.normalize_images)

    def get_label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Class numbers for numbers or names of classes. Raises ValueError for a class that does not exist."""
        ids = label_ids(labels, self.num_classes, self.config.id2label)
        if untrained := sorted(set(ids).difference(self.classes)):
            logging.get_logger(__name__).warning(
                f"The network had no image of the classes {untrained} in training, so that their images mean nothing. "
                f"It was trained on {self.classes}."
            )
        return ids

    def _set_guidance(self, guidance_scale: float, guidance: Guidance | None) -> None:
        """Check both guidances of a call, and start with this scale of the classifier-free one."""
        if guidance is not None:
            check_guidance(guidance, self)
            guidance.prepare(self.num_classes)
        self._guidance_scale = check_guidance_scale(guidance_scale, self)
        self._guided_by = {"guidance": None if guidance is None else type(guidance).__name__}

    def _network(self) -> Callable:
        """The network, with classifier-free guidance of `_guidance_scale`, which a callback may have changed."""
        scale = check_guidance_scale(self._guidance_scale, self)
        if scale == 1:
            return self.unet
        return ClassifierFreeNetwork(self.unet, scale, functools.partial(null_labels, self))

    def draw_latents(
        self, batch_size: int, device, generator, latents: torch.Tensor | None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Unit normal noise of shape (B, C, H, W), float32: `latents`, checked, or drawn from `generator`.

        `size` is height and width for a network whose config has no `sample_size`.
        """
        size = self.state_size or size
        if size is None:
            if latents is None:
                raise ValueError("The network's config has no sample_size; pass `latents` of the wanted shape.")
            size = tuple(latents.shape[-2:])
        shape = (batch_size, self.unet.config.in_channels, *size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=torch.float32)

    def prepare_latents(
        self, batch_size: int, device, generator, latents: torch.Tensor | None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The first sample x_T: `draw_latents` times the scheduler's `init_noise_sigma`."""
        return self.draw_latents(batch_size, device, generator, latents, size) * self.scheduler.init_noise_sigma

    @property
    def _execution_device(self) -> torch.device:
        weight = input_weight(self.unet)
        return super()._execution_device if weight is None else weight.device

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """w of classifier-free guidance in the last call. Set `pipe._guidance_scale` in a callback to change it."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or last call."""
        return self._num_timesteps

    # The parts of a call ----------------------------------------------------------------------------------------------

    def check_call(
        self,
        batch_size: int | None,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback: Callable | None = None,
        callback_inputs: list[str] | None = None,
    ) -> int | None:
        """Check arguments of a call before any work, and start the record of its seeds.

        Returns the batch size, None where no argument says it. Raises ValueError for an argument that does not fit, or
        a scheduler that does not fit the network.
        """
        check_output_type(output_type)
        self._check_vae(output_type)
        check_callback(callback, callback_inputs, self._callback_tensor_inputs)
        if batch_size is not None:
            check_count(batch_size=batch_size)
            batch_size = int(batch_size)
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
                got = f"shape {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise ValueError(f"latents must be a tensor of shape (B, C, H, W), got {got}.")
            if not latents.isfinite().all():
                raise ValueError("latents hold values that are NaN or infinite.")
            batch_size = batch_size or len(latents)
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(
                "generator must be a torch.Generator, such as `torch.Generator().manual_seed(0)`, or a list of them, "
                f"got {generator!r}."
            )
        if isinstance(generator, list):
            if not generator:
                raise ValueError("generator is an empty list; pass one generator, or one per image.")
            batch_size = batch_size or len(generator)
        self._match_scheduler()
        self._seeds = None if latents is not None else fresh_seeds(generator)
        return batch_size

    def _batch_size_with(self, given: torch.Tensor, name: str, batch_size: int | None) -> int | None:
        """The batch size, with what is to be edited: one entry serves any number of images."""
        if len(given) == 1:
            return batch_size
        if batch_size not in (None, len(given)):
            raise ValueError(f"{name} has {len(given)} entries for batch_size={batch_size}; pass one or {batch_size}.")
        return len(given)

    def _sample(self, latents, class_labels, callback_on_step_end, guidance=None, **step_options) -> torch.Tensor:
        """Run all steps that were set, from the first sample to the last; `step_options` go to `scheduler.step`.

        Raises NotFiniteError for a network that gives NaN or infinite values.
        """
        scheduler, sums, scales, replaced = self.scheduler, [], [], []
        guided, moved = guidance is not None and guidance.scale != 0, []
        timestep_factor, dtype = self._match_scheduler(), input_dtype(self.unet)
        targets = scheduler.target_timesteps if jumps(scheduler) else None
        labels = condition(class_labels)
        self._num_timesteps = len(scheduler.timesteps)
        scheduler.set_begin_index(0)  # else it waits for the device to look the first timestep up
        show_run(self)

        # diffusers makes a bar also to hide it
        hidden = getattr(self, "_progress_bar_config", {}).get("disable")
        with contextlib.nullcontext() if hidden else self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                times = (t * timestep_factor,) if targets is None else (t, targets[i])
                network = self._network()
                scales.append(self._guidance_scale)
                if guided:
                    with for_gradients(self.vae):
                        model_output, any_moved = guided_output(
                            guidance,
                            network,
                            scheduler,
                            latents,
                            t,
                            times,
                            class_labels,
                            dtype,
                            self.num_classes,
                            self.decode_states,
                        )
                    moved.append(any_moved)
                else:
                    model_input = scheduler.scale_model_input(latents, t).to(dtype)
                    model_output = network(model_input, *times, **labels, return_dict=False)[0]
                model_output = model_output.to(latents.dtype)
                latents = scheduler.step(model_output, t, latents, return_dict=False, **step_options)[0]
                if callback_on_step_end is not None:
                    show_run(self)
                    kept = latents.clone()
                    latents = called_back(callback_on_step_end, self, i, t, latents)
                    replaced.append(~torch.isclose(latents, kept, rtol=0, atol=0, equal_nan=True).all())
                sums.append(sum_of(latents))  # looked at once, at the end, as `replaced`
                if progress_bar is not None:
                    progress_bar.update()
        source = "The network"
        if replaced and torch.stack(replaced).any():
            self._seeds, source = None, "The network, or the callback,"  # these seeds do not make these images
        if set(scales) - {1}:
            self._guided_by["guidance_scale"] = scales[0] if len(set(scales)) == 1 else scales
        check_finite(sums, getattr(scheduler, "call_sigmas", scheduler.sigmas)[: self._num_timesteps], source=source)
        if moved and not any(moved):
            logging.get_logger(__name__).warning(
                "The gradient of the guidance loss was 0 for every image at every step, so that nothing was guided. "
                "The loss is constant where it was asked: reached already, cut off by clamp or relu, or rounded."
            )
        return latents

    def checked_images(
        self, states: torch.Tensor, output_type: str, denormalize: bool = True, shown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[bool] | None]:
        """(images, flags of the safety checker or None) of `states` at level 0; flagged images are black.

        The images are in [-1, 1], decoded by `vae`; for output type "latent" the states themselves. With
        `denormalize=False` `states` are images in [0, 1] already. `shown` is looked at and shown in place of `states`.
        """
        shown, latent = states if shown is None else shown, output_type == "latent"
        if denormalize and (self.safety_checker is not None or not latent):
            shown = self.decode_states(shown)
        return without_unsafe(self, states if latent else shown, denormalize, shown)

    def _finish(
        self, latents, output_type, return_dict, class_labels=None, denormalize: bool = True, **provenance
    ) -> CTMPipelineOutput | tuple:
        """The last sample (with `denormalize=False` images in [0, 1]), checked, as the images that were asked for.

        `provenance` replaces what the scheduler says of the run. A tuple holds the images, and with a safety checker
        its flags.
        """
        latents, flags = self.checked_images(latents, output_type, denormalize)
        seeds = None if self._interrupt else self._seeds
        records = run_records(self, len(latents), class_labels, seeds, {**self._guided_by, **provenance})
        each = None if denormalize else [False] * len(latents)  # None takes all at once
        images = self.image_processor.postprocess(latents, output_type, each)
        if output_type == "pil" and self.config.add_provenance:
            for image, record in zip(images, records):
                image.info.update(png_text(record))
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if flags is None else (images, flags)
        return CTMPipelineOutput(images=images, nsfw_content_detected=flags, provenance=records)

    @torch.no_grad()
    @own_run
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
            class_labels: class of each image, numbers or (if the checkpoint carries `id2label`) names; one for all or
                one each. Default for a class-conditional network: drawn at random, as `generator` says.
            num_inference_steps: number of steps N. Default 1 with `CTMScheduler`, else 18. N network evaluations with
                `CTMScheduler`, 2N - 1 with `EDMHeunScheduler`. Where the checkpoint's scheduler has a preset for N
                (`pipe.scheduler.config.presets`, made by `training.tune`) and none of the next five is given, its
                levels and gamma are used.
            gamma: in [0, 1], a number or one per step; 0 is deterministic, 1 is consistency-model multistep. None is
                the checkpoint's own: that of its preset for N, else the scheduler config's. `CTMScheduler` only.
            timesteps: instead of `num_inference_steps`, the c_noise at which each step starts.
            sigmas: instead, the noise level at which each step starts, descending.
            target_sigmas: in place of gamma, the level to which each step jumps before noise leads up to the start of
                the next. `CTMScheduler` only, as the next.
            final_sigma: where the last step ends: sigma_min by default, higher to leave noise in the images, or 0; see
                `CTMScheduler.set_timesteps`.
            generator: source of all noise, or one per image.
            latents: unit normal noise of shape (B, C, H, W) to start from; it is multiplied by
                `scheduler.init_noise_sigma`.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": what the sampler
                returned, unclipped, float32, images in [-1, 1] or with a `vae` its latents. A safety checker checks
                them all, "latent" too, for which it decodes them.
            return_dict: return a `CTMPipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network
                evaluation; may return a dict with new latents, and set `pipe._interrupt` or `pipe._guidance_scale`.
            callback_on_step_end_tensor_inputs: which tensors it gets; "latents" is all there is.
            guidance: a `ClassifierGuidance`, `LossGuidance` or other `Guidance`, which says what its gradient costs.
                Every step, in `EDMHeunScheduler` every call, is guided. `CTMScheduler` and `EDMHeunScheduler` only.
            guidance_scale: w of classifier-free guidance, g_null + w (g_y - g_null), for checkpoints trained with label
                dropout. 1 is conditional, 0 unconditional, each at the usual cost; others double each network call's
                batch. Exact in the score; in a jump an approximation that gets better with shorter steps (see
                `ClassifierFreeNetwork`).

        Returns:
            `CTMPipelineOutput` with `images`, or a tuple that holds them and, with a safety checker, its flags.

        Raises:
            ValueError: for arguments that do not fit each other, the network or the scheduler; the message says what to
                pass. And for a network that gives NaN or infinite values.
        """
        # 1. Check
        batch_size = self.check_call(
            batch_size, latents, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self._set_guidance(guidance_scale, guidance)

        # 2. Prepare
        device = self._execution_device
        class_labels, batch_size = labels_and_batch_size(self, class_labels, batch_size, generator, device)
        self.set_timesteps(
            device,
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            gamma=gamma,
            target_sigmas=target_sigmas,
            final_sigma=final_sigma,
        )
        latents = self.prepare_latents(batch_size, device, generator, latents)

        # 3. Sample
        latents = self._sample(latents, class_labels, callback_on_step_end, guidance, generator=generator)

        # 4. Finish
        return self._finish(latents, output_type, return_dict, class_labels)


def pipeline_condition(pipe: CTMPipeline, class_labels, batch_size: int, device) -> dict[str, torch.Tensor]:
    """The network's arguments beside state and time: {"class_labels": (B,)}, or {} for an unconditional one.

    Unlike in sampling, labels are not drawn: a given image has a class. Raises ValueError for labels missing or not
    expected.
    """
    if class_labels is None and pipe.unet.config.num_class_embeds is not None:
        raise ValueError("This network is class-conditional: pass `class_labels`, the class of each image.")
    return condition(labels_and_batch_size(pipe, class_labels, batch_size, None, device)[0])


def exact_denoiser(pipe: CTMPipeline, **condition) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """D(x, sigma) of a pipeline's network, in the dtype of `x`; the network computes in its own.

    Raises ValueError for a scheduler that does not know the package's preconditioning.
    """
    preconditioning = preconditioning_of(pipe.scheduler)
    if preconditioning is None:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} is not a scheduler of this package. Use "
            "`EDMHeunScheduler.from_config(pipe.scheduler.config)`, or `CTMScheduler` for a CTM."
        )

    dtype = pipe.unet.dtype

    def network(sample, *times, **options):
        return pipe.unet(sample.to(dtype), *times, **options)

    return lambda x, sigma: preconditioning.denoise(network, x, sigma, **condition)
