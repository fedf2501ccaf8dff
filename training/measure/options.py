# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The options that programs share which measure a model."""

from dataclasses import dataclass

from ..cli.errors import UserError
from ..cli.names import public_name
from ..cli.options import POSITIVE, option
from ..cli.shared_options import DataOptions, TeacherOptions


@dataclass
class ModelOptions(DataOptions):
    """A model and the images that it is compared with."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    batch_size: int = option(250, "Most images per network evaluation.", must_be=POSITIVE)
    device: str = option("auto", "'cpu', 'cuda', 'cuda:1', ..., or 'auto': a GPU if there is one.")

    def sort_values(self, *names: str) -> None:
        """Sort the values of these options and drop repeated ones. Each needs at least one."""
        for name in names:
            self.check(len(getattr(self, name)) > 0, name, "one value or more")
            setattr(self, name, sorted(set(getattr(self, name))))


@dataclass
class PairOptions(TeacherOptions, ModelOptions):
    """A CTM, a teacher, or both."""

    model: str | None = option(
        None, "The CTM: a folder or a repository on the Hub. Default: none, the teacher is measured alone."
    )
    teacher: str | None = option(
        None, "A diffusion model, sampled with Heun's method: a folder or a repository on the Hub. Default: none."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.teacher is None:
            raise UserError("--model or --teacher is needed: a folder or a repository on the Hub.")

    def notes_on_guidance(self) -> list[str]:
        """A line for a report whose teacher is guided, else none."""
        if not self.teacher_is_guided:
            return []
        by = f"by `{public_name(self.guidance_teacher)}`" if self.guidance_teacher else "without a classifier"
        return [f"The teacher is guided {by}, scale {self.teacher_guidance_scale:g}; each call is two evaluations."]
