"""What starts with each process of SGLang: flags always, everything else only where a policy is asked for.

Imports of what compresses are inside functions: without a policy nobody pays for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vlcache_sgl.config import ConfigError
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.sglang_hooks.facades import Scheduler, ServerArgs, Tokenizers
from vlcache_sgl.sglang_hooks.flags import REFUSED, add_flags, engine_arguments, is_server, read_command_line, refuse
from vlcache_sgl.sglang_hooks.patching import Patches, PatchPoint
from vlcache_sgl.sglang_hooks.settings import config_of


def start_scheduler(
    original: Callable[..., None], scheduler: Scheduler, server_args: ServerArgs, *args: Any, **kwargs: Any
) -> None:
    """Around ``Scheduler.__init__``: here an error stops the server, unlike in SGLang's plugin loading."""
    config = config_of(server_args)
    if config is None:
        original(scheduler, server_args, *args, **kwargs)
        return
    from vlcache_sgl.sglang_hooks.patch_points import runtime_points
    from vlcache_sgl.sglang_hooks.session import Session

    session = Session(config)
    patches = Patches(runtime_points(session))
    patches.install()
    patches.verify()
    try:
        original(scheduler, server_args, *args, **kwargs)
        patches.verify()
        session.check_started(scheduler)
    except (ConfigError, PolicyError) as error:
        # What the user can change is one line; SGLang would print the path to it through its own source.
        refuse(error)


def say_it_once(original: Callable[..., Exception], rank: int, process: Any) -> BaseException:
    """Around what `sglang serve` ends with when a scheduler has ended: one that has refused has said why."""
    process.join(timeout=10)
    return SystemExit(REFUSED) if process.exitcode == REFUSED and is_server() else original(rank, process)


def start_tokenizer(
    original: Callable[..., None], manager: Tokenizers, server_args: ServerArgs, *args: Any, **kwargs: Any
) -> None:
    """Around ``TokenizerManager.__init__``, in the process that reads requests."""
    config = config_of(server_args)
    if config is None:
        original(manager, server_args, *args, **kwargs)
        return
    from vlcache_sgl.sglang_hooks.gate import Gate
    from vlcache_sgl.sglang_hooks.request_points import HTTP_POINTS, MEDIA_POINTS, gate_http_points, gate_points

    # `sgl.Engine` has no HTTP server, and importing one would configure logging and event loops.
    serves = "sglang.srt.entrypoints.http_server" in sys.modules
    Patches([*MEDIA_POINTS, *(HTTP_POINTS if serves else ())]).install()
    original(manager, server_args, *args, **kwargs)
    gate = Gate(config, manager.model_config, int(server_args.tp_size or 1))
    Patches([*gate_points(gate), *(gate_http_points(gate) if serves else ())]).install()


START_POINTS = (
    PatchPoint("sglang.srt.server_args:ServerArgs.add_cli_args", "after", add_flags, "flags in --help"),
    PatchPoint("sglang.srt.server_args:ServerArgs.from_cli_args", "around", read_command_line, "reading flags"),
    PatchPoint(
        "sglang.srt.entrypoints.engine:Engine.server_args_class", "replace", engine_arguments, "sgl.Engine(kv_policy=)"
    ),
    PatchPoint("sglang.srt.managers.scheduler:Scheduler.__init__", "around", start_scheduler, "starting compression"),
    PatchPoint(
        "sglang.srt.entrypoints.engine:_scheduler_died_error", "around", say_it_once, "one line for what is refused"
    ),
    PatchPoint(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.__init__",
        "around",
        start_tokenizer,
        "a 400 for what cannot be read or served",
    ),
)
"""All that is patched without --kv-policy; each of these does nothing then."""
