"""The ``offload`` command. The configuration file is the interface; the command names what to do with it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import offload
from offload import starting
from offload.checkpoint.commit_weights import DTYPES
from offload.checkpoint.export import export_run
from offload.checkpoint.verify import verify_run
from offload.config import Config, ConfigError
from offload.config_loading import load_config_file
from offload.console.config_template import config_template
from offload.console.output import BROKEN_PIPE, Output, OutputClosed
from offload.console.tables import print_line
from offload.heap import without_tcache
from offload.launch.interrupt import INTERRUPTED, only_exit_is_left, own_process
from offload.launch.plan_command import plan
from offload.launch.profile_run import profile_run
from offload.launch.ranks import SaidByAnotherRankError
from offload.launch.torchrun import of_rank, start_ranks
from offload.launch.train import launch
from offload.machine.bench_ssd import full_plan
from offload.machine.bench_ssd_report import run_bench_ssd
from offload.machine.calibration import keep_bench
from offload.machine.doctor import run_doctor
from offload.profiling.plain import profile_plain
from pagemem.errors import OffloadError
from pagemem.units import parse_bytes

# ---- what each command calls -----------------------------------------------------------------------------------------


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.ranks is not None:
        config = _read_config(arguments)
        words = [arguments.file, *(word for change in arguments.changes for word in ("--set", change))]
        return start_ranks(arguments.ranks, config, words)
    return launch(_training_config(arguments))


def _config(_arguments: argparse.Namespace) -> int:
    Output().print(config_template(), soft_wrap=True, highlight=False, markup=False, end="")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.plain is not None:
        if arguments.changes:
            raise ConfigError("--set changes a FILE; --plain has none")
        profile_plain(arguments.plain, arguments.steps, arguments.to, Output())
        return 0
    profile_run(_training_config(arguments), arguments.steps, arguments.to, Output())
    return 0


def _training_config(arguments: argparse.Namespace) -> Config:
    """The configuration to train. Where it saves memory, this process is replaced by one like it whose heap needs no
    trimming, see `offload.heap`."""
    config = _read_config(arguments)
    environment = without_tcache(os.environ)
    if (
        arguments.owns_process
        and config.memory.activations is not None
        and config.memory.heap == "auto"
        and environment is not None
    ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return config


def _read_config(arguments: argparse.Namespace, *more: str) -> Config:
    return load_config_file(Path(arguments.file), [*arguments.changes, *more])


def _plan(arguments: argparse.Namespace) -> int:
    config = _read_config(arguments, *([] if arguments.ram is None else [f"memory.ram={arguments.ram}"]))
    return plan(config, arguments)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.max_shard < 1:
        raise ConfigError(f"--max-shard is {arguments.max_shard}; it must be at least 1 byte")
    export_run(
        arguments.run, arguments.to, paths=arguments.paths, commit=arguments.commit, dtype=arguments.dtype,
        max_shard_bytes=arguments.max_shard, console=Output(),
    )  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = verify_run(arguments.run, paths=arguments.paths, commit=arguments.commit, console=Output())
    return 0 if not report.faults else 1


def _bench_ssd(arguments: argparse.Namespace) -> int:
    console = Output()
    plan = full_plan(arguments.size, arguments.seconds)
    results = run_bench_ssd(arguments.paths, plan, console, as_json=arguments.json)
    if (line := keep_bench(results)) and not arguments.json:  # which is to be the last line
        print_line(console, line)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.file is None and arguments.changes:
        raise ConfigError("--set changes a FILE; name one")
    file = None if arguments.file is None else Path(arguments.file)
    return run_doctor(file, Output(), changes=arguments.changes, bench=arguments.bench, as_json=arguments.json)


# ---- the command line ------------------------------------------------------------------------------------------------

#: Names and settings of an argument, as argparse takes them.
_Argument = tuple[tuple[str, ...], dict[str, Any]]


def _argument(*names: str, **settings: Any) -> _Argument:
    return names, settings


def _size(text: str) -> int:
    """Bytes, as a type of argparse."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Command:
    """A command.

    Attributes:
        line: what it does, in a line; ``description``: in its own help.
        one_of: arguments of which one has to be given.
    """

    call: Callable[[argparse.Namespace], int]
    line: str
    arguments: tuple[_Argument, ...] = ()
    description: str | None = None
    one_of: tuple[_Argument, ...] = ()


_FILE: Final = _argument("file", metavar="FILE", help="configuration: .toml, .json, .yaml or .yml")
_SET: Final = _argument(
    "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes",
    help="change one value of the file, e.g. --set memory.ram=64MiB; the value is JSON, or else text; may be given "
    "several times",
)  # fmt: skip
_RUN: Final = (
    _argument("run", type=Path, metavar="RUN", help="run directory: the first folder of the run's ssd.paths"),
    _argument(
        "--path", action="append", default=[], type=Path, metavar="FOLDER", dest="paths",
        help="another folder of the run's ssd.paths, where it is not found under the name in its configuration; may be "
        "given several times",
    ),
)  # fmt: skip
_JSON_LINE: Final = _argument("--json", action="store_true", help="end with one JSON object on the last line")
_DEBUG: Final[dict[str, Any]] = {"action": "store_true", "help": "show the traceback of an error"}


def _mb_per_s(option: str, text: str) -> _Argument:
    return _argument(option, type=float, metavar="MB/S", help=text)


_COMMANDS: Final[dict[str, _Command]] = {
    "launch": _Command(
        _launch,
        "train the model of a configuration file",
        (
            _FILE,
            _SET,
            _argument(
                "--ranks", type=int, metavar="N",
                help="train on N processes of this machine, started by torchrun, which share the model as [parallel] "
                "says; over several machines start torchrun yourself: torchrun ... -m offload launch FILE",
            ),
        ),
    ),
    "config": _Command(
        _config,
        "print a configuration file with every key at its default",
        description="""Print a configuration file (TOML) with every key, its description and its default, to start from:
        offload config > run.toml. Edit the lines that end in "required".""",
    ),
    "profile": _Command(
        _profile,
        "record a few steps: memory, waits and their causes",
        (
            _SET,
            _argument(
                "--steps", type=int, default=4, metavar="N",
                help="steps to record, after those until the plan is followed (default: 4)",
            ),
            _argument(
                "--to", type=Path, default=Path("profile"), metavar="DIR",
                help="folder for the files: new, empty, or of an earlier profile, which is replaced (default: profile)",
            ),
        ),
        """Train a few steps of a configuration, from the beginning, and write report.html (opens without a network),
        trace.json (for ui.perfetto.dev) and summary.json. Page files lie in temporary folders beside those of
        ssd.paths and are removed; an existing run is neither read nor changed. With --plain, profile training that
        does not use the engine: what takes its memory, and what the engine would save.""",
        (
            (_FILE[0], {**_FILE[1], "nargs": "?"}),
            _argument(
                "--plain", metavar="MODULE:CALLABLE",
                help="instead of FILE: training that does not use the engine. The callable returns (model, optimizer, "
                "step), step() making one step",
            ),
        ),
    ),
    "plan": _Command(
        _plan,
        "estimate memory and step time without training",
        (
            _FILE,
            _SET,
            _argument("--ram", metavar="SIZE", help="instead of memory.ram, e.g. 64GiB"),
            *(
                _mb_per_s(
                    f"--ssd-{what}",
                    f"{what} bandwidth of the page files; default: ssd.limit_mb_per_s, or else that of the disk here, "
                    "measured once; for another machine what the engine assumes of an unknown disk",
                )
                for what in ("read", "write")
            ),
            _argument(
                "--flops", type=float, metavar="F",
                help="floating-point operations/s of matrix products, e.g. 2e11; default: kernels are timed here",
            ),
            _mb_per_s(
                "--ram-speed",
                "memory bandwidth of other kernels; if only one of the two is given, the other is measured",
            ),
            _mb_per_s(
                "--device-ram-speed", "as --ram-speed, of kernels on the device; the optimizer updates in RAM"
            ),
            _mb_per_s(
                "--h2d", "bandwidth from RAM to the device; default: what the engine assumes of an unknown one"
            ),
            _argument(
                "--ranks", type=int, default=1, metavar="N",
                help="ranks that share the model as [parallel] says; memory, disk and time are of each (default: 1)",
            ),
            _mb_per_s("--link", "bandwidth at which a rank sends to others; default: what the engine assumes"),
            _argument(
                "--machine-ram", type=_size, metavar="SIZE",
                help="RAM that the process can have, e.g. 64GiB; default: what is free here",
            ),
            _argument(
                "--machine-disk", type=_size, metavar="SIZE",
                help="room for page files, e.g. 2TB; default: what is free on the disks of ssd.paths",
            ),
            _argument(
                "--machine-device", type=_size, metavar="SIZE",
                help="memory of the device, e.g. 80GB, for its pages and what kernels allocate",
            ),
            _argument(
                "--depth", metavar="NAME",
                help="the model's argument that counts its layers, for --largest; default: n_layer or the like",
            ),
            _argument("--largest", action="store_true", help="also find the largest batch and depth that fit"),
            _argument(
                "--explain", action="store_true",
                help="also list the tasks of the planned step: when each starts and ends, by which op, for which op",
            ),
            _argument(
                "--explain-trace", type=Path, metavar="FILE",
                help="write the planned step for ui.perfetto.dev, with the tracks of a profile's trace.json",
            ),
            _argument("--json", action="store_true", help="print one JSON object instead of the table"),
        ),
        """Estimate memory and step time without training: pages and bytes of each tier, the smallest budget, and the
        step time with the lane that limits it. The model is built without bytes. Exact mode only; the model is
        given two int64 tensors of train.batch rows and train.seq tokens.""",
    ),
    "export": _Command(
        _export,
        "write the weights of a commit as safetensors files",
        (
            *_RUN,
            _argument("--commit", metavar="NAME_OR_NUMBER", help="commit to export; default: the newest whole one"),
            _argument(
                "--to", required=True, type=Path, metavar="DIR",
                help="folder for the files, new or empty; it appears whole or not at all",
            ),
            _argument(
                "--dtype", default="keep", choices=list(DTYPES),
                help="dtype of the parameters; keep: the one they were computed in (default). fp32 takes the fp32 "
                "masters where there are any",
            ),
            _argument(
                "--max-shard", default="5GB", type=_size, metavar="SIZE",
                help="most bytes of tensors in a file, e.g. 500MB (default: 5GB)",
            ),
        ),
        """Write the weights of a commit as safetensors files in the layout of Hugging Face: shards and
        model.safetensors.index.json, names as in model.state_dict(), buffers included, tied weights once. The run
        must not be training; it is not changed.""",
    ),
    "verify": _Command(
        _verify,
        "read and check every committed page of a run",
        (*_RUN, _argument("--commit", metavar="NAME_OR_NUMBER", help="verify this commit alone; default: all")),
        """Check a run's commits: every manifest, the page map, and the checksum of every page that a commit names. The
        run must not be training; it is not changed. Exit code 1 if anything is wrong.""",
    ),
    "bench-ssd": _Command(
        _bench_ssd,
        "measure the bandwidth of folders for page files",
        (
            _argument("paths", nargs="+", type=Path, metavar="PATH", help="folder to measure, one per disk"),
            _argument(
                "--size", default="512MiB", type=_size, metavar="SIZE",
                help="bytes of the test file in each folder (default: 512MiB)",
            ),
            _argument(
                "--seconds", default=0.5, type=float, metavar="S",
                help="seconds of each measurement, for writing and for reading (default: 0.5)",
            ),
            _JSON_LINE,
        ),
        """Measure the bandwidth of page files in folders: GB/s of writes and reads by request size and number of
        threads, then a recommendation. A temporary folder is made in each and removed again; nothing else there is
        touched.""",
    ),
    "doctor": _Command(
        _doctor,
        "check this machine",
        (
            _argument("file", nargs="?", metavar="FILE", help="configuration to look at as well"),
            _SET,
            _argument(
                "--no-bench", action="store_false", dest="bench", help="measure nothing, and write nothing anywhere"
            ),
            _JSON_LINE,
        ),
        """Check this machine, one line per check. With FILE, check its folders and its budget as well; without, the
        current directory as a folder for page files. Exit code 1 if there is a problem.""",
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line and exit code 2, as every other error is one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are explained."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="offload", description="Train models larger than memory out of RAM and SSD.")
    parser.add_argument("--version", action="version", version=f"offload {offload.__version__}")
    parser.add_argument("--debug", **_DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        made = commands.add_parser(name, help=command.line, description=command.description)
        made.set_defaults(call=command.call)
        choice = made.add_mutually_exclusive_group(required=True) if command.one_of else made
        for names, settings in command.one_of:
            choice.add_argument(*names, **settings)
        for names, settings in command.arguments:
            made.add_argument(*names, **settings)
        made.add_argument("--debug", default=argparse.SUPPRESS, **_DEBUG)  # one before the command holds
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM where that ends
    a run cleanly, 141 when the output's reader has gone (2, by argparse, for a wrong command line).

    What a caller can put right is one line on stderr; any other exception is a defect and keeps its traceback.
    """
    arguments = build_parser().parse_args(argv)
    arguments.owns_process = argv is None
    if arguments.owns_process and not {"", os.getcwd()} & set(sys.path):
        # Last, so that a file there takes the place of no installed package: factories that lie beside the
        # configuration.
        sys.path.append(os.getcwd())
    try:
        starting.end()
        if arguments.owns_process:
            own_process()
        if of_rank() and arguments.call is not _launch:
            raise ConfigError("only offload launch runs on ranks; start other commands without torchrun")
        code: int = arguments.call(arguments)
        if arguments.owns_process:
            only_exit_is_left()
        return code
    except SaidByAnotherRankError:
        if arguments.debug:
            raise
        return 1
    except (OffloadError, ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        where = "" if isinstance(error, (OffloadError, ConfigError)) else " (--debug shows where)"
        for line in (str(error) or type(error).__name__).splitlines():
            print(f"offload: {of_rank()}error: {line}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if arguments.owns_process:
            only_exit_is_left()
        print("offload: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OutputClosed:
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
