"""The command's table of subcommands."""

import importlib

import pytest

from vlcache_sgl import __version__
from vlcache_sgl.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in printed
        assert command.summary in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "vlcache: no command; choose one of: calibrate, "), (["polices"], "(did you mean 'policies'?)")],
)
def test_no_or_unknown_command_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"vlcache-sgl {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, capsys):
    assert callable(importlib.import_module(COMMANDS[name].module).main)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: vlcache {name}" in capsys.readouterr().out
