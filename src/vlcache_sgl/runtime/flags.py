"""Our flags on SGLang's command line and in `sgl.Engine(...)`.  Active in every process, policy or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from vlcache_sgl.config import FLAGS, ConfigError, KVConfig, config_from
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.runtime.compat import choose_defaults, model_config_dict, unsupported_arguments, unsupported_model
from vlcache_sgl.runtime.patching import PatchPoint

CONFIG_ATTRIBUTE = "_vlcache_config"
"""Where a `KVConfig` travels on SGLang's ServerArgs: underscored attributes survive pickling into child processes."""


def config_of(server_args: Any) -> KVConfig | None:
    """The settings that came with `server_args`; None when no policy was asked for."""
    config: KVConfig | None = getattr(server_args, CONFIG_ATTRIBUTE, None)
    return config


def add_flags(_: object, parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's parser, in a group of their own."""
    group = parser.add_argument_group("KV-cache compression (vlcache-sgl)")
    for flag in FLAGS:
        # argparse expands %: none of the help texts has one.
        if flag.switch:
            group.add_argument(flag.name, action="store_true", default=None, help=flag.help)
        else:
            # Choices are checked by us: argparse would print SGLang's whole usage above the one line that matters.
            metavar = flag.metavar or "|".join(flag.choices or ())
            group.add_argument(flag.name, default=None, metavar=metavar, help=flag.help)


def read_command_line(original: Callable[..., Any], cls: Any, args: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: a wrong value ends the process with one line and exit code 2."""
    server_args = original(cls, args)
    try:
        attach_config(server_args, vars(args))
    except ConfigError as error:
        refuse(error)
    return server_args


def refuse(error: Exception) -> NoReturn:
    """End the process as argparse would."""
    print(f"sglang serve: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def attach_config(server_args: Any, values: Mapping[str, Any]) -> None:
    """Read our flags from `values` and, when a policy is asked for, check everything that can be checked now.

    Raises:
        ConfigError: with one line that names the flag and the reason.
    """
    config = config_from(values)
    if config is None:
        return
    from vlcache_sgl.runtime.requests import Choices

    try:
        Choices(config)
    except PolicyError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("--kv-") else f"--kv-policy: {message}") from error
    model = model_config_dict(server_args)
    problems = [*unsupported_arguments(server_args), *unsupported_model(model)]
    if problems:
        raise ConfigError(problems[0])
    choose_defaults(server_args, model)
    setattr(server_args, CONFIG_ATTRIBUTE, config)


def engine_arguments(server_args_class: Any) -> Any:
    """Wrap ``Engine.server_args_class`` so that `sgl.Engine(..., kv_policy="vlcache")` works."""
    names = {flag.dest for flag in FLAGS}

    def build(**kwargs: Any) -> Any:
        ours = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        server_args = server_args_class(**kwargs)
        attach_config(server_args, ours)
        return server_args

    return staticmethod(build)


def start_scheduler(original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``Scheduler.__init__``: here an error stops the server, unlike in SGLang's plugin loading."""
    config = config_of(server_args)
    if config is None:
        original(scheduler, server_args, *args, **kwargs)
        return
    from vlcache_sgl.runtime.session import Session

    session = Session(config)
    session.install()
    original(scheduler, server_args, *args, **kwargs)
    session.check_started(scheduler)


def start_tokenizer(original: Callable[..., None], manager: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``TokenizerManager.__init__``, in the process that reads requests."""
    config = config_of(server_args)
    if config is None:
        original(manager, server_args, *args, **kwargs)
        return
    from vlcache_sgl.runtime.gate import Gate
    from vlcache_sgl.runtime.patch_points import HTTP_POINTS, MEDIA_POINTS, gate_points
    from vlcache_sgl.runtime.patching import Patches

    # `sgl.Engine` has no HTTP server, and importing one would configure logging and event loops.
    http = HTTP_POINTS if "sglang.srt.entrypoints.http_server" in sys.modules else ()
    Patches([*MEDIA_POINTS, *http]).install()
    original(manager, server_args, *args, **kwargs)
    Patches(gate_points(Gate(config, manager.model_config, int(server_args.tp_size or 1)))).install()


FLAG_POINTS = (
    PatchPoint("sglang.srt.server_args:ServerArgs.add_cli_args", "after", add_flags, "flags in --help"),
    PatchPoint("sglang.srt.server_args:ServerArgs.from_cli_args", "around", read_command_line, "reading flags"),
    PatchPoint(
        "sglang.srt.entrypoints.engine:Engine.server_args_class", "replace", engine_arguments, "sgl.Engine(kv_policy=)"
    ),
    PatchPoint("sglang.srt.managers.scheduler:Scheduler.__init__", "around", start_scheduler, "starting compression"),
    PatchPoint(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.__init__",
        "around",
        start_tokenizer,
        "a 400 for what cannot be read or served",
    ),
)
"""All that is patched without --kv-policy; each of these does nothing then."""
