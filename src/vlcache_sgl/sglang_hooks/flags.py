"""Our flags on SGLang's command line and in `sgl.Engine(...)`.  Active in every process, policy or not."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlcache_sgl.config import FLAGS, ConfigError, KVConfig, config_from
from vlcache_sgl.policy import PolicyError, registry
from vlcache_sgl.sglang_hooks.attention_kinds import resolved_model, unsupported_model
from vlcache_sgl.sglang_hooks.compat import (
    choose_defaults,
    kv_shape,
    model_config_dict,
    reads_no_images,
    unsupported_arguments,
    unsupported_configuration,
)
from vlcache_sgl.sglang_hooks.facades import ServerArgs
from vlcache_sgl.sglang_hooks.settings import give_config
from vlcache_sgl.spelling import nearest
from vlcache_sgl.weights import read_weights


def add_flags(_: object, parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's parser, in a group of their own."""
    group = parser.add_argument_group("KV-cache compression (vlcache-sgl)")
    for flag in FLAGS:
        # argparse expands %: none of the help texts has one.
        if flag.switch:
            group.add_argument(flag.name, action="store_true", default=None, help=flag.explained)
        else:
            # Values are checked by us: argparse would print SGLang's whole usage above the one line that matters.
            group.add_argument(flag.name, default=None, metavar=flag.values.metavar, help=flag.explained)


class _OneLine(argparse.ArgumentParser):
    """A parser of our flags alone whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def check_before_imports() -> None:
    """End `sglang serve` on a wrong flag of ours now, where this is the process that a user has started.

    The first code of ours that SGLang runs calls this, when it has imported a fraction of itself.  Everything that is
    checked here is checked again when SGLang reads its command line: other ways to start it come there only.
    """
    arguments = _serve_arguments(sys.argv, sys.orig_argv)
    if arguments is None or any(one.partition("=")[0] == "--config" for one in arguments):
        return  # with a file of settings, the command line is not all that is said
    try:
        check_flags(_our_flags(arguments))
    except ConfigError as error:
        refuse(error)


def _serve_arguments(argv: Sequence[str], original: Sequence[str]) -> Sequence[str] | None:
    """What follows `sglang serve` or `python -m sglang.launch_server`; None in any other process.

    Args:
        argv, original: as `sys.argv` and `sys.orig_argv`; the first begins with ``-m`` while modules are imported.
    """
    if os.path.basename(argv[0]) == "sglang" and argv[1:2] == ["serve"] and original[-len(argv) :] == argv:
        return argv[2:]
    if argv[0] == "-m" and "sglang.launch_server" in original:
        return argv[1:]
    return None


def _our_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Values of our flags, shortened names as argparse knows them; raises ConfigError for a misspelt one."""
    parser = _OneLine(add_help=False)
    add_flags(None, parser)
    values, others = parser.parse_known_args(list(arguments))
    for other in others:
        name = other.partition("=")[0]
        if name.startswith("--kv-") and (meant := nearest(name, [flag.name for flag in FLAGS], cutoff=0.9)):
            raise ConfigError(f"unknown flag {name} (did you mean {meant}?)")
    return vars(values)


def check_flags(values: Mapping[str, Any]) -> KVConfig | None:
    """The settings of our flags, checked as far as that needs no model; None when no policy is asked for.

    Raises:
        ConfigError: with one line that names the flag and the reason.
    """
    config = config_from(values)
    if config is None:
        return None
    from vlcache_sgl.policy.choice import Choices

    with _blaming("--kv-policy"):
        registry().require_sound()
        default = Choices(config).default
    if config.weights not in ("auto", "off"):
        try:
            read_weights(Path(config.weights))
        except ValueError as error:
            raise ConfigError(f"--kv-weights: {error}") from error
    with _blaming("--kv-allow-policies"):
        for name in config.allow_policies:
            if name != "*":
                registry().recipe(name)
    if config.head_cells and not config.allow_policies and default.policy.selection.heads != "split":
        raise ConfigError(
            f"--kv-head-cells does nothing: {config.policy} keeps the same tokens in all heads, "
            "and --kv-allow-policies none allows no other"
        )
    return config


def read_command_line(original: Callable[..., Any], cls: Any, args: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: a wrong value ends the process with one line and exit code 2."""
    server_args = original(cls, args)
    try:
        attach_config(server_args, vars(args))
    except ConfigError as error:
        refuse(error)
    return server_args


REFUSED = 2
"""Exit code of what a user has to change, argparse's."""


def refuse(error: Exception) -> NoReturn:
    """End the process as argparse would."""
    print(f"sglang serve: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(REFUSED)


def is_server() -> bool:
    """Whether this process is one that a user has started to serve, rather than a program with `sgl.Engine` in it."""
    return "sglang.launch_server" in sys.modules or "sglang.launch_server" in sys.orig_argv


@contextlib.contextmanager
def _blaming(flag: str) -> Iterator[None]:
    """Whatever is wrong with a policy inside is the value of `flag`, unless the message names another one of ours."""
    try:
        yield
    except PolicyError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("--kv-") else f"{flag}: {message}") from error


def attach_config(server_args: ServerArgs, values: Mapping[str, Any]) -> None:
    """Read our flags from `values` and, when a policy is asked for, check them against the model and SGLang's flags.

    Raises:
        ConfigError: with one line that names the flag and the reason.
    """
    config = check_flags(values)
    if config is None:
        return
    model = model_config_dict(server_args)
    if problem := next(unsupported_arguments(server_args), None):
        raise ConfigError(problem)
    resolved = resolved_model(server_args)
    problems = unsupported_configuration(model) if resolved is None else unsupported_model(resolved)
    if problem := next(problems, None):
        raise ConfigError(problem)
    reads_images = not reads_no_images(model) if resolved is None else resolved.is_multimodal
    if config.scope == "vision" and not reads_images:
        raise ConfigError(f"--kv-scope vision: {server_args.model_path} reads no images, use --kv-scope all")
    if config.weights not in ("auto", "off") and (shape := kv_shape(model)) is not None:
        try:
            read_weights(Path(config.weights)).check(*shape)
        except ValueError as error:
            raise ConfigError(f"--kv-weights {config.weights} {error}") from error
    choose_defaults(server_args, model)
    give_config(server_args, config)


def engine_arguments(server_args_class: Any) -> Any:
    """Wrap ``Engine.server_args_class`` so that `sgl.Engine(..., kv_policy="vlcache")` works."""
    names = {flag.dest for flag in FLAGS}

    def build(**kwargs: Any) -> Any:
        ours = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        server_args = server_args_class(**kwargs)
        attach_config(server_args, ours)
        return server_args

    return staticmethod(build)
