"""The `daxfs` command: its subcommands, their help, and what becomes of every exception."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from daxfs import __version__
from daxfs.cli import bench, device, helper, lab, mounting, pins, policy, scenario, volumes
from daxfs.cli.output import Failure, say
from daxfs.errors import FsError

_EXAMPLES = {
    "mkfs": "daxfs mkfs --size 4G --label scratch /var/tmp/x.img",
    "mount": "daxfs mount --image /var/tmp/x.img -o allow_other /mnt/x",
    "umount": "daxfs umount /mnt/x",
    "fsck": "daxfs fsck --repair /var/tmp/x.img",
    "info": "daxfs info --json /mnt/x",
    "extents": "daxfs extents /mnt/x/film",
    "pin": "daxfs pin --offset 0 --length 1M --fill 0xa5 --hold 60 /mnt/x/film",
    "pins": "daxfs pins /mnt/x",
    "busy": "daxfs busy --json /mnt/x",
    "policy": "daxfs policy /mnt/x/film wait",
    "device status": "daxfs device status /mnt/x",
    "device remove": "daxfs device remove --deadline 10 /mnt/x",
    "device inject-error": "daxfs device inject-error --block 5000 --count 2 /mnt/x",
    "scenario list": "daxfs scenario list truncate",
    "scenario show": "daxfs scenario show corruption-2017",
    "scenario run": "daxfs scenario run corruption-2017 --policy unsafe",
    "scenario storm": "daxfs scenario storm --steps 1000000 --policy wait",
    "lab crash": "daxfs lab crash --seconds 600 --domain eadr",
    "bench": "daxfs bench --quick --only data --peers daxfs,minimal_ll --plot bench.svg",
}
_COMMANDS: dict[str, Callable[..., object]] = {
    "mkfs": volumes.mkfs,
    "mount": mounting.mount,
    "umount": mounting.umount,
    "fsck": volumes.fsck,
    "info": volumes.info,
    "extents": pins.extents,
    "pin": pins.pin,
    "pins": pins.pins,
    "busy": pins.busy,
    "policy": policy.policy,
    "device status": device.status,
    "device remove": device.remove,
    "device inject-error": device.inject_error,
    "scenario list": scenario.catalogue,
    "scenario show": scenario.show,
    "scenario run": scenario.run,
    "scenario storm": scenario.storm,
    "lab crash": lab.crash,
    "bench": bench.bench,
}
_GROUPS = {
    "device": "The device under a mount: its state, taking it away, errors of its medium.",
    "scenario": "What the lists argued about, played: who pins, what is called, what must be seen under each policy.",
    "lab": "What the lab explores by itself: crashes, at the grain of cache lines.",
}


def _help_of(command: Callable[..., object]) -> str:
    """Its docstring, a line for each paragraph: they are folded as wide as the terminal is."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"daxfs {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _app(first: str) -> typer.Typer:
    """The command line whose first word is `first`. Only what it names is built, which for all of them takes a while; if it
    names nothing, everything is there, for help and for what is said about mistakes."""
    app = typer.Typer(
        name="daxfs",
        help="A file system on emulated persistent memory, where a pinned block survives truncate and hole punch.",
        epilog="Start with: `daxfs mount /mnt/x`. Exit codes: 0 done, 1 failed, 2 wrong usage; fsck has those of fsck(8).",
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in _GROUPS.items()}
    wanted = [name for name in _COMMANDS if name.split()[0] == first] or list(_COMMANDS)
    for name, group in groups.items():
        if any(command.startswith(f"{name} ") for command in wanted):
            app.add_typer(group, name=name)
    for name in wanted:
        within, _, last = name.rpartition(" ")
        command, example = _COMMANDS[name], f"Example: {_EXAMPLES[name]}"
        (groups[within] if within else app).command(last, help=_help_of(command), epilog=example)(command)
    return app


def run(arguments: list[str]) -> int:
    """Carry out a command line; returns the exit code."""
    try:
        app = _app(arguments[0] if arguments else "")
        result = app(arguments or ["--help"], prog_name="daxfs", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        return code if arguments else 2
    except Failure as failure:
        say(str(failure))
        return failure.code
    except typer.TyperException as problem:
        context = getattr(problem, "ctx", None)
        say(f"{problem.format_message().rstrip('.')}; see: {context.command_path if context else 'daxfs'} --help")
        return 16 if arguments[:1] == ["fsck"] else problem.exit_code  # fsck(8): 2 means "reboot"
    except FsError as problem:
        say(problem.why)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads: what is still buffered may go there
        return 1
    except OSError as problem:
        say(": ".join(str(part) for part in (problem.filename, problem.strerror or problem) if part))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as bug:
        if os.environ.get("DAXFS_DEBUG"):
            raise
        say(f"internal error: {type(bug).__name__}: {bug} (a bug in daxfs; DAXFS_DEBUG=1 shows where)")
        return 1


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) > 1 and not any(name.split()[0] == arguments[0] for name in _COMMANDS):
        arguments = helper.translate(arguments) or arguments  # as mount.fuse3 calls it
    sys.exit(run(arguments))


def mount_helper() -> None:
    """The command mount.daxfs."""
    command = helper.translate(sys.argv[1:])
    if command is None:
        say("usage: mount.daxfs IMAGE DIRECTORY [-o OPTIONS]; mount(8) calls it")
        sys.exit(2)
    sys.exit(run(command))
