"""Options shared by the commands: a policy's, and a dataclass's fields as options and back."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Collection
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from reprdpo.data import TokenizeConfig
from reprdpo.experiments.config import build
from reprdpo.experiments.stages import Policy
from reprdpo.models import Quantization

DTYPE = "what the weights are held in (default: auto, as they were saved)"


def add_policy(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Give ``parser`` the options that name a causal LM."""
    parser.add_argument("--model", required=required, help="folder or hub name of a causal LM")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help=DTYPE)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_fields(parser, Quantization)


def policy_of(namespace: argparse.Namespace) -> Policy:
    """The policy the command line names."""
    data = take_fields(namespace, TokenizeConfig)
    quantization = take_fields(namespace, Quantization)
    return Policy(namespace.model, data, namespace.dtype, namespace.trust_remote_code, quantization)


def add_fields(parser: argparse.ArgumentParser, cls: type[Any], *, only: Collection[str] | None = None) -> None:
    """Give ``parser`` an option for every field of the dataclass ``cls`` (help for those in ``only``, where given)."""
    group, documented, hints = parser.add_argument_group(cls.__name__), documented_fields(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init or f"--{field.name}" in parser._option_string_actions:
            continue
        group.add_argument(
            f"--{field.name}",
            type=str if _is_text(hints[field.name]) else _from_yaml,
            default=argparse.SUPPRESS,
            metavar=_metavar(hints[field.name]),
            help=_escaped(describe(field, documented)) if only is None or field.name in only else argparse.SUPPRESS,
        )


def given(namespace: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of ``cls`` that the command line set."""
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    return {name: value for name, value in vars(namespace).items() if name in names}


def take_fields(namespace: argparse.Namespace, cls: type[Any]) -> Any:
    """An instance of ``cls`` from the command line, every value's type checked."""
    return build(cls, given(namespace, cls))


def _is_text(hint: Any) -> bool:
    """Whether a field takes nothing but text, which is not to be read as YAML: "no" would be False."""
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return all(choice is type(None) or _is_text(choice) for choice in get_args(hint))
    return isinstance(hint, type) and issubclass(hint, str)


def _metavar(hint: Any) -> str:
    """The choices where they are few, else the kind of value."""
    choices = [each for each in (get_args(hint) or [hint]) if each is not type(None)]
    if len(choices) == 1 and get_origin(choices[0]) is Literal:
        hint, choices = choices[0], list(get_args(choices[0]))
    if get_origin(hint) is Literal:
        return "|".join(map(str, choices))
    return {bool: "true|false", int: "INT", float: "NUMBER"}.get(choices[0], "VALUE") if len(choices) == 1 else "VALUE"


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a value") from None


def documented_fields(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of the class and its bases say of their fields under "Attributes:"."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        found |= re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return found


def describe(field: dataclasses.Field[Any], documented: dict[str, str]) -> str:
    """A field's help, or what is ``documented`` of it, and its default."""
    text = " ".join(str(field.metadata.get("help", documented.get(field.name, ""))).split())
    if field.default in (dataclasses.MISSING, None) or "default" in text:
        return text
    default = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{text.removesuffix('.')} (default: {default})"


def _escaped(text: str) -> str:
    """For argparse, which formats help with %; transformers' comes with its signs doubled already."""
    return text.replace("%%", "%").replace("%", "%%")
