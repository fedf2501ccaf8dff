# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Dataclasses as command lines: YAML below, command line above, checked."""

import argparse
import copy
import dataclasses
import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from diffusers_ctm.checks import NotFiniteError

from .errors import UserError, without_token


Config = TypeVar("Config")

Limit = tuple[str, Callable[[Any], bool]]

# Limits for `must_be` of an option: words, and whether a value is so.
POSITIVE: Limit = ("positive", lambda value: value > 0)
NOT_NEGATIVE: Limit = ("0 or more", lambda value: value >= 0)
TWO_OR_MORE: Limit = ("2 or more", lambda value: value >= 2)
SEED: Limit = ("in 0..2147483647", lambda value: 0 <= value < 2**31)  # NumPy takes 32 bits; processes add their rank
BELOW_ONE: Limit = ("in [0, 1)", lambda value: 0 <= value < 1)
UNIT: Limit = ("in [0, 1]", lambda value: 0 <= value <= 1)
FOLDER: Limit = ("a folder", lambda path: path != "" and not os.path.isfile(path))


def option(
    default: Any,
    help: str,
    choices: Collection[Any] | None = None,
    recorded: bool = True,
    free: bool = False,
    must_be: Limit | None = None,
    needs: str | None = None,
) -> Any:
    """A field of an option class.

    Args:
        help: one sentence for `--help`.
        choices: the values that it may take. Default: any.
        recorded: whether it is part of a result, and therefore of `training.json`; otherwise it says where, how often
            and what is shown.
        free: whether a resumed run may have another value. An option that is not recorded may always differ.
        must_be: a limit of its value, or of each value of a list. If the default is None, None is allowed.
        needs: another option, without which (None, 0, false or empty) this one has no use and must be left out.
    """
    if choices is not None:
        must_be = (f"one of {', '.join(map(str, choices))}", list(choices).__contains__)
    metadata = {
        "help": help.replace("%", "%%"),  # argparse formats it
        "choices": choices,
        "recorded": recorded,
        "free": free or not recorded,
        "must_be": must_be,
        "needs": needs,
    }
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(entry: dataclasses.Field) -> Any:
    """The default of an option."""
    return entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()


def with_default(config_class: type, name: str, default: Any) -> Any:
    """The option `name` of `config_class` again, for a subclass where it has another default."""
    return field(default=default, metadata=config_class.__dataclass_fields__[name].metadata)


class Checked:
    """Base of the option classes: `check(condition, field, advice)` raises UserError naming the field."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            words, holds = entry.metadata["must_be"] or ("", lambda value: True)
            if value is not None or entry.default is not None:
                self.check(all(map(holds, value if isinstance(value, list) else [value])), entry.name, words)
            needed = entry.metadata["needs"]
            if needed is not None and not getattr(self, needed):
                self.refuse([entry.name], f"needs --{needed}", "give both, or neither")

    def check(self, condition: bool, name: str, advice: str) -> None:
        """Raise UserError that the option `name` must be `advice`, unless `condition` holds."""
        if not condition:
            raise UserError(f"--{name} must be {advice}, got {getattr(self, name)!r}.")

    def refuse(self, names: list[str], reason: str, advice: str = "leave it out") -> None:
        """Raise UserError, with the reason and advice, if one of these options differs from its default."""
        for entry in dataclasses.fields(self):
            if entry.name in names and getattr(self, entry.name) != default_of(entry):
                raise UserError(f"--{entry.name} {reason}; {advice}.")


class OptionHelp(argparse.HelpFormatter):
    """Each option under one name, with its default unless that is None."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        given = action.option_strings and action.default not in (None, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if given else action.help


class OptionParser(HfArgumentParser):
    """A command line with the fields of an option class, under a heading for each class that it is made of.

    The heading is the first line of that class's docstring. The options that `config_class` adds itself come first,
    without a heading.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _add_dataclass_arguments(self, config_class: type) -> None:
        hints = get_type_hints(config_class)
        left = {entry.name: entry for entry in dataclasses.fields(config_class)}
        for each in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):  # in the order of the fields
            entries = [left.pop(name) for name in each.__annotations__ if name in left]
            group = self
            if entries and each is not config_class:
                group = self.add_argument_group(each.__doc__.splitlines()[0].rstrip("."))
            for entry in map(copy.copy, entries):
                entry.type = hints[entry.name]
                entry.metadata = {key: entry.metadata[key] for key in ("help", "choices") if entry.metadata[key]}
                self._parse_dataclass_field(group, entry)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read `config_class` from the command line `argv` and from the YAML file that its `--config` names.

    The options that its class attribute POSITIONAL lists may also be given without their names, in that order. An
    empty value makes an option None that may be None: `--teacher ""`.

    Exits with status 2 and a message that names the option if one is unknown, malformed or impossible.
    """
    parser = _make_parser(config_class)
    try:
        return _parse(parser, config_class, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def typed_options(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Options as `read_yaml` gives them in the types of `config_class`, read and checked as the command line is.

    Raises UserError as `parse_config` exits.
    """
    config = _parse(_make_parser(config_class), config_class, _arguments(values))
    return {name: getattr(config, name) for name in values}


def _make_parser(config_class: type) -> OptionParser:
    positional = getattr(config_class, "POSITIONAL", ())
    usage = " ".join(["%(prog)s", *(name.upper() for name in positional), "[--option VALUE ...]"])
    parser = OptionParser(
        config_class, description=config_class.__doc__, usage=usage, allow_abbrev=False, formatter_class=OptionHelp
    )
    for name in positional:
        parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=f"The same as --{name}.")
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # an empty list is a value too
        elif isinstance(action, argparse._StoreFalseAction):
            action.help = argparse.SUPPRESS  # --no_option beside --option
        elif action.nargs is None and action.default is None and action.type is not None:
            action.type = _or_none(action.type)
    return parser


def _parse(parser: OptionParser, config_class: type[Config], argv: list[str]) -> Config:
    known, _ = parser.parse_known_intermixed_args(argv)
    arguments = _yaml_arguments(known.config)
    _check_names(arguments, parser, f"--config {known.config}: ")
    _check_names(argv, parser)
    return config_class(**vars(parser.parse_intermixed_args(arguments + argv)))


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind`, but None for an empty text: the command line can so take back an option of the YAML file."""

    @functools.wraps(kind, updated=())
    def read(text: str) -> Any:
        return kind(text) if text else None

    return read


def _check_names(words: Sequence[str], parser: argparse.ArgumentParser, where: str = "") -> None:
    """Raise UserError for a word that looks like an option and is none. A part of a name is none either."""
    options = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        name = word.split("=")[0]
        if re.match("--[a-zA-Z]", name) and name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
            advice = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{where}{name} is no option{advice}. See --help for all.")


class _Words(yaml.SafeLoader):
    """YAML whose values are words as they are written, but for null: YAML takes `no` for false and `010` for 8."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str) -> Any:
    """The content of a YAML file, with values as `_Words`."""
    return yaml.load(Path(path).read_text(encoding="utf-8"), _Words)


def _yaml_arguments(path: str | None) -> list[str]:
    """The contents of a YAML file as command-line arguments: both are then read and checked alike."""
    if path is None:
        return []
    try:
        values = read_yaml(path) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold `option: value` lines.")
    return _arguments(values)


def _arguments(values: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in values.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def save_config(config: Any, path: str) -> None:
    """Write the options as YAML, readable by `--config`, with the defaults that were filled in."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "config"}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def run_program(main: Callable[[Config], Any], config_class: type[Config]) -> None:
    """Parse the command line and call `main`.

    A UserError, or a network that gives NaN, becomes one line on standard error, without a token, and exit status 1.
    With CTM_TRACEBACK its traceback is shown too.
    """
    config = parse_config(config_class)
    try:
        main(config)
    except (UserError, NotFiniteError) as error:
        if os.environ.get("CTM_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {without_token(str(error))}", file=sys.stderr)
        sys.exit(1)
