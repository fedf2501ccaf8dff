# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Draw, and keep what a classifier is sure of."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from diffusers.utils import BaseOutput, logging

from .checks import check_count, check_output_type
from .class_labels import labels_and_batch_size
from .guidance import check_classes, check_same_classes, classifier_logits


@dataclass
class RejectionSamplingOutput(BaseOutput):
    """Output of `rejection_sample`.

    Args:
        images: those accepted, at most as many as asked, in the pipeline's `output_type`.
        class_labels: the class of each, int64 on the CPU; None without classes.
        scores: the classifier's probability of that class (without classes: of the likeliest one) for each.
        complete: whether there are as many images as asked.
        acceptance_rate: accepted / drawn; with `top_fraction` that fraction, by construction.
        num_drawn: images that were drawn and classified. Each cost the pipeline's network evaluations.
        num_batches: calls of the pipeline.
    """

    images: Any
    class_labels: torch.Tensor | None
    scores: torch.Tensor
    complete: bool
    acceptance_rate: float
    num_drawn: int
    num_batches: int


@torch.no_grad()
def rejection_sample(
    pipe: Any,
    classifier: Callable[[torch.Tensor], torch.Tensor],
    num_images: int,
    class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
    threshold: float | None = None,
    top_fraction: float | None = None,
    batch_size: int = 64,
    max_batches: int = 100,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
    **sampling: Any,
) -> RejectionSamplingOutput:
    """Classifier-rejection sampling (Razavi et al. 2019): draw images, and keep those that a classifier is sure of.

    Args:
        pipe: a `CTMPipeline`. Images that its safety checker flags are never accepted.
        classifier: called as `classifier(images)`, images in [-1, 1] of shape (B, C, H, W); returns logits of shape (B,
            classes).
        num_images: how many are wanted.
        class_labels: class of each, one for all or one each of `num_images`. A class-conditional network is asked for
            it, an unconditional one draws until the classifier sees it. Default: drawn at random from `generator`; none
            for an unconditional network, whose images are judged by the likeliest class.
        threshold: accept an image if the classifier gives its class at least this probability, in [0, 1].
        top_fraction: instead, of each class draw n / top_fraction images and accept the n with the highest probability,
            in (0, 1].
        batch_size: most images drawn at once.
        max_batches: most calls of the pipeline. When they are used up, what was accepted by then is returned with
            `complete=False`.
        generator: source of all noise.
        output_type: as in `pipe.__call__`.
        sampling: further arguments of `pipe.__call__`, such as `num_inference_steps`, `gamma` and `guidance`.

    Raises:
        ValueError: arguments that contradict each other or the classifier's classes.
    """
    if (threshold is None) == (top_fraction is None):
        raise ValueError("Pass exactly one of `threshold` and `top_fraction`.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability in [0, 1], got {threshold!r}.")
    if top_fraction is not None and not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction must lie in (0, 1], got {top_fraction!r}.")
    check_count(num_images=num_images, batch_size=batch_size, max_batches=max_batches)
    check_output_type(output_type)
    if isinstance(generator, list):
        raise ValueError("rejection_sample takes one generator: how many images are drawn is not known before.")
    refused = {"latents", "return_dict"} & set(sampling)
    if refused:
        raise ValueError(f"rejection_sample takes no {', '.join(sorted(refused))}.")

    wanted = _wanted_labels(pipe, class_labels, num_images, generator)
    conditional = pipe.num_classes is not None
    latent = output_type == "latent"  # else the pipeline's own clipping is what counts, as in restoration
    if top_fraction is not None and not conditional and class_labels is not None:
        raise ValueError(
            "An unconditional network cannot be asked for a class: with class_labels pass `threshold`, not "
            "`top_fraction`."
        )

    kept: dict[int | None, list[tuple[float, torch.Tensor]]] = {label: [] for label in wanted}
    needed = Counter(wanted)
    to_draw = Counter({label: math.ceil(count / (top_fraction or 1) - 1e-9) for label, count in needed.items()})
    drawn: Counter = Counter()
    accepted = batches = 0
    while batches < max_batches:
        missing = Counter({label: count - len(kept[label]) for label, count in needed.items()})
        if top_fraction is None:  # as many as the rate so far lets expect to be enough
            count = math.ceil(missing.total() * (drawn.total() + 1) / (accepted + 1))
            # A batch without room for all goes on after the last one: no class may keep the others out.
            start = drawn.total() % missing.total() if missing.total() > batch_size else 0
            labels = list(islice(cycle(missing.elements()), start, start + min(count, batch_size)))
        else:
            labels = list((to_draw - drawn).elements())[:batch_size]
        if not labels:
            break
        condition = {"class_labels": labels} if conditional else {"batch_size": len(labels)}
        output = pipe(**condition, generator=generator, output_type="latent" if latent else "pt", **sampling)
        x_0, unsafe = output.images, output.nsfw_content_detected or [False] * len(labels)
        drawn.update(labels)
        batches += 1
        for label, score, image, flagged in zip(
            *_judged(classifier, pipe.decode_states(x_0) if latent else 2 * x_0 - 1, labels, pipe.num_classes),
            x_0,
            unsafe,
            strict=True,
        ):
            if label in kept and score >= (threshold or 0.0) and not flagged:
                accepted += 1
                if top_fraction is not None or len(kept[label]) < needed[label]:
                    kept[label].append((score, image.clone()))  # a view would keep its whole batch
    if top_fraction is not None:
        for label, images in kept.items():
            images.sort(key=lambda pair: pair[0], reverse=True)
            del images[math.floor(drawn[label] * top_fraction + 1e-9) :]
        accepted = sum(map(len, kept.values()))

    queues = {label: iter(images) for label, images in kept.items()}
    chosen = [(label, *pair) for label in wanted if (pair := next(queues[label], None)) is not None]
    rate, complete = accepted / drawn.total(), len(chosen) == num_images
    if not complete:
        logging.get_logger(__name__).warning(
            f"{len(chosen)} of {num_images} images after {batches} batches ({drawn.total()} images drawn, {rate:.1%} "
            "accepted). Raise max_batches, accept more, or guide the sampler."
        )
    images = torch.stack([image for *_, image in chosen]) if chosen else x_0[:0]
    return RejectionSamplingOutput(
        images=_postprocessed(pipe, images, output_type),
        class_labels=None
        if None in kept
        else torch.tensor([label for label, *_ in chosen], dtype=torch.int64, device="cpu"),
        scores=torch.tensor([score for _, score, _ in chosen], device="cpu"),
        complete=complete,
        acceptance_rate=rate,
        num_drawn=drawn.total(),
        num_batches=batches,
    )


def _wanted_labels(
    pipe: Any, class_labels: Any, num_images: int, generator: torch.Generator | None
) -> list[int | None]:
    """The class of each wanted image; None where there are no classes."""
    if pipe.num_classes is not None:
        return labels_and_batch_size(pipe, class_labels, num_images, generator, "cpu")[0].tolist()
    if class_labels is None:
        return [None] * num_images
    return check_classes(torch.as_tensor(class_labels, device="cpu"), num_images, torch.iinfo(torch.int64).max).tolist()


def _judged(
    classifier: Callable[[torch.Tensor], torch.Tensor],
    x_0: torch.Tensor,
    labels: list[int | None],
    num_classes: int | None,
) -> tuple[list[int | None], list[float]]:
    """The class and the score of each image: the class that was asked, or the likeliest of an unconditional network."""
    logits = classifier_logits(classifier, x_0.clamp(-1, 1))
    check_same_classes(logits, num_classes, "Pass one that gives the logits of the network's classes in their order")
    probabilities = logits.softmax(1)
    if not probabilities.isfinite().all():
        raise ValueError("The classifier returned NaN or infinite logits.")
    if labels[0] is not None:
        targets = check_classes(torch.tensor(labels, device="cpu"), len(x_0), probabilities.shape[1])
    if num_classes is None:
        scores, likeliest = probabilities.max(1)
        return labels if labels[0] is None else likeliest.tolist(), scores.tolist()
    return labels, probabilities.gather(1, targets.to(probabilities.device)[:, None])[:, 0].tolist()


def _postprocessed(pipe: Any, images: torch.Tensor, output_type: str) -> Any:
    """`images`, in [0, 1] unless they are "latent", as `output_type`, also if there are none."""
    if len(images) or output_type == "latent":
        return pipe.image_processor.postprocess(images, output_type, [False] * len(images))
    return {"pil": [], "pt": images, "np": images.permute(0, 2, 3, 1).cpu().numpy()}[output_type]
