"""The ``offload`` command. The configuration file is the interface; the command names what to do with it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import offload
from offload import starting
from offload.checkpoint.commit_weights import DTYPES
from offload.checkpoint.export import export_run
from offload.checkpoint.verify import verify_run
from offload.config import Config, ConfigError, load_config
from offload.config_file import apply_changes, read_config_file
from offload.config_template import config_template
from offload.console.output import BROKEN_PIPE, Output, OutputClosed
from offload.forecast.fit import Room, room_here
from offload.forecast.forecast import Question, check_forecastable, forecast
from offload.forecast.rates import rates_of
from offload.forecast.report import print_forecast, shown
from offload.heap import without_tcache
from offload.launch.interrupt import INTERRUPTED, only_exit_is_left, own_process
from offload.launch.profile_run import profile_run
from offload.launch.train import launch
from offload.machine.bench_ssd import full_plan
from offload.machine.bench_ssd_report import run_bench_ssd
from offload.machine.doctor import run_doctor
from offload.profiling.plain import profile_plain
from pagemem.errors import OffloadError
from pagemem.units import parse_bytes

#: Each command: what it does, in a line, and in its own help.
_COMMANDS: Final[dict[str, tuple[str, str | None]]] = {
    "launch": ("train the model of a configuration file", None),
    "config": (
        "print a configuration file with every key at its default",
        """Print a configuration file (TOML) with every key, its description and its default, to start from: offload
        config > run.toml""",
    ),
    "profile": (
        "record a few steps: memory, waits and their causes",
        """Train a few steps of a configuration, from the beginning, and write report.html (opens without a network),
        trace.json (for ui.perfetto.dev) and summary.json. Page files lie in temporary folders beside those of
        ssd.paths and are removed; an existing run is neither read nor changed. With --plain, profile training that
        does not use the engine: what takes its memory, and what the engine would save.""",
    ),
    "plan": (
        "estimate memory and step time without training",
        """Estimate memory and step time without training: pages and bytes of each tier, the smallest budget, and the
        step time with the lane that limits it. The model is built without bytes. Exact mode only; the model is
        given two int64 tensors of train.batch rows and train.seq tokens.""",
    ),
    "export": (
        "write the weights of a commit as safetensors files",
        """Write the weights of a commit as safetensors files in the layout of Hugging Face: shards and
        model.safetensors.index.json, names as in model.state_dict(), buffers included, tied weights once. The run
        must not be training; it is not changed.""",
    ),
    "verify": (
        "read and check every committed page of a run",
        """Check a run's commits: every manifest, the page map, and the checksum of every page that a commit names. The
        run must not be training; it is not changed. Exit code 1 if anything is wrong.""",
    ),
    "bench-ssd": (
        "measure the bandwidth of folders for page files",
        """Measure the bandwidth of page files in folders: GB/s of writes and reads by request size and number of
        threads, then a recommendation. A temporary folder is made in each and removed again; nothing else there is
        touched.""",
    ),
    "doctor": (
        "check this machine",
        """Check this machine, one line per check. With FILE, check its folders and its budget as well; without, the
        current directory as a folder for page files. Exit code 1 if there is a problem.""",
    ),
}


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line and exit code 2, as every other error is one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are explained."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="offload", description="Train models larger than memory out of RAM and SSD.")
    parser.add_argument("--version", action="version", version=f"offload {offload.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_options = {
        "launch": _add_launch,
        "config": _add_config,
        "profile": _add_profile,
        "plan": _add_plan,
        "export": _add_export,
        "verify": _add_verify,
        "bench-ssd": _add_bench_ssd,
        "doctor": _add_doctor,
    }
    for name, (line, description) in _COMMANDS.items():
        add_options[name](commands.add_parser(name, help=line, description=description))
    for command in commands.choices.values():  # without a default: one before the command holds
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def _add_launch(command: argparse.ArgumentParser) -> None:
    _add_file(command)
    command.set_defaults(call=_launch)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.set_defaults(call=_config)


def _add_profile(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group(required=True)
    _add_file(command, what, nargs="?")
    what.add_argument(
        "--plain",
        metavar="MODULE:CALLABLE",
        help="instead of FILE: training that does not use the engine. The callable returns (model, optimizer, step), "
        "step() making one step",
    )
    command.add_argument(
        "--steps",
        type=int,
        default=4,
        metavar="N",
        help="steps to record, after those until the plan is followed (default: 4)",
    )
    command.add_argument(
        "--to", type=Path, default=Path("profile"), metavar="DIR",
        help="folder for the files: new, empty, or of an earlier profile, which is replaced (default: profile)",
    )  # fmt: skip
    command.set_defaults(call=_profile)


def _add_file(
    command: argparse.ArgumentParser,
    within: argparse._ActionsContainer | None = None,
    nargs: str | None = None,
    what: str = "configuration: .toml, .json, .yaml or .yml",
) -> None:
    (within or command).add_argument("file", nargs=nargs, metavar="FILE", help=what)
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes",
        help="change one value of the file, e.g. --set memory.ram=64MiB; may be given several times",
    )  # fmt: skip


_ASSUMED_DISK: Final = "default: ssd.limit_mb_per_s, or else what the engine assumes of an unknown disk"
#: Options of `offload plan` with a value: its type, its name, and what it is.
_PLAN_OPTIONS: Final[dict[str, tuple[type, str, str]]] = {
    "--ram": (str, "SIZE", "instead of memory.ram, e.g. 64GiB"),
    "--ssd-read": (float, "MB/S", f"read bandwidth of the page files; {_ASSUMED_DISK}"),
    "--ssd-write": (float, "MB/S", f"write bandwidth of the page files; {_ASSUMED_DISK}"),
    "--flops": (
        float,
        "F",
        "floating-point operations/s of matrix products, e.g. 2e11; default: kernels are timed here",
    ),
    "--ram-speed": (
        float,
        "MB/S",
        "memory bandwidth of other kernels; if only one of the two is given, the other is measured",
    ),
    "--device-ram-speed": (float, "MB/S", "as --ram-speed, of kernels on the device; the optimizer updates in RAM"),
    "--h2d": (float, "MB/S", "bandwidth from RAM to the device; default: what the engine assumes of an unknown one"),
    "--machine-ram": (str, "SIZE", "RAM that the process can have, e.g. 64GiB; default: what is free here"),
    "--machine-disk": (str, "SIZE", "room for page files, e.g. 2TB; default: what is free on the disks of ssd.paths"),
    "--machine-device": (str, "SIZE", "memory of the device, e.g. 80GB, for its pages and what kernels allocate"),
    "--depth": (
        str,
        "NAME",
        "the model's argument that counts its layers, for --largest; default: n_layer or the like",
    ),
}


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_file(command)
    for option, (kind, name, text) in _PLAN_OPTIONS.items():
        command.add_argument(option, type=kind, metavar=name, help=text)
    command.add_argument("--largest", action="store_true", help="also find the largest batch and depth that fit")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    command.set_defaults(call=_plan)


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_run(command, "commit to export; default: the newest whole one")
    command.add_argument(
        "--to",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the files, new or empty; it appears whole or not at all",
    )
    command.add_argument(
        "--dtype",
        default="keep",
        choices=list(DTYPES),
        help="dtype of the parameters; keep: the one they were computed in (default). fp32 takes the fp32 masters "
        "where there are any",
    )
    command.add_argument(
        "--max-shard",
        default="5GB",
        metavar="SIZE",
        dest="max_shard",
        help="most bytes of tensors in a file, e.g. 500MB (default: 5GB)",
    )
    command.set_defaults(call=_export)


def _add_verify(command: argparse.ArgumentParser) -> None:
    _add_run(command, "verify this commit alone; default: all")
    command.set_defaults(call=_verify)


def _add_bench_ssd(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder to measure, one per disk")
    command.add_argument(
        "--size", default="512MiB", metavar="SIZE", help="bytes of the test file in each folder (default: 512MiB)"
    )
    command.add_argument(
        "--seconds",
        default=0.5,
        type=float,
        metavar="S",
        help="seconds of each measurement, for writing and for reading (default: 0.5)",
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    command.set_defaults(call=_bench_ssd)


def _add_doctor(command: argparse.ArgumentParser) -> None:
    _add_file(command, nargs="?", what="configuration to look at as well")
    command.add_argument(
        "--no-bench", action="store_false", dest="bench", help="measure nothing, and write nothing anywhere"
    )
    command.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    command.set_defaults(call=_doctor)


def _add_run(command: argparse.ArgumentParser, commit: str) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="run directory: the first folder of the run's ssd.paths")
    command.add_argument(
        "--path",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        dest="paths",
        help="another folder of the run's ssd.paths, where it is not found under the name in its configuration; may be "
        "given several times",
    )
    command.add_argument("--commit", metavar="NAME_OR_NUMBER", help=commit)


def _launch(arguments: argparse.Namespace) -> int:
    config = _read_config(arguments)
    _start_anew_if_worth_it(arguments, config)
    return launch(config)


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.plain is not None:
        if arguments.changes:
            raise ConfigError("--set changes a FILE; --plain has none")
        profile_plain(arguments.plain, arguments.steps, arguments.to, Output())
        return 0
    config = _read_config(arguments)
    _start_anew_if_worth_it(arguments, config)
    profile_run(config, arguments.steps, arguments.to, Output())
    return 0


def _start_anew_if_worth_it(arguments: argparse.Namespace, config: Config) -> None:
    """Replace this process by one like it whose heap needs no trimming, see `offload.heap`, where memory is to be
    saved."""
    environment = without_tcache(os.environ)
    if (
        arguments.owns_process
        and config.memory.activations is not None
        and config.memory.heap == "auto"
        and environment is not None
    ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _read_config(arguments: argparse.Namespace, *more: str) -> Config:
    raw = read_config_file(Path(arguments.file))
    return load_config(apply_changes(raw, [*arguments.changes, *more]), arguments.file)


def _plan(arguments: argparse.Namespace) -> int:
    ram = [] if arguments.ram is None else [f"memory.ram={arguments.ram}"]
    config = _read_config(arguments, *ram)
    check_forecastable(config)
    for option in ("machine_device", "h2d", "device_ram_speed"):
        if config.device == "cpu" and getattr(arguments, option) is not None:
            name = "--" + option.replace("_", "-")
            raise ConfigError(
                f'{name}: device is "cpu", which has no memory of its own; --set device=cuda --set memory.device=SIZE'
            )
    of_device = ("machine_device", "flops", "ram_speed", "device_ram_speed")
    missing = ", ".join("--" + option.replace("_", "-") for option in of_device if getattr(arguments, option) is None)
    if config.device.startswith("cuda") and missing:
        raise ConfigError(
            f'device is "{config.device}", of which the kernels of a CPU tell nothing: give {missing} as well'
        )
    named = {
        "ram": "ram_speed",
        "ssd_read": "ssd_read",
        "ssd_write": "ssd_write",
        "h2d": "h2d",
        "device_ram": "device_ram_speed",
    }
    given = {rate: getattr(arguments, name) for rate, name in named.items()}
    bytes_per_s = {rate: None if value is None else value * 1e6 for rate, value in given.items()}
    rates = rates_of(config, flops=arguments.flops, **bytes_per_s)
    given_room = [
        None if text is None else _size(option, text)
        for option, text in (
            ("--machine-ram", arguments.machine_ram),
            ("--machine-disk", arguments.machine_disk),
            ("--machine-device", arguments.machine_device),
        )
    ]
    room = None
    if any(n_bytes is not None for n_bytes in given_room):
        here, (ram_bytes, disk_bytes, device_bytes) = room_here(config), given_room
        room = Room(
            here.ram_bytes if ram_bytes is None else ram_bytes,
            here.disk_bytes if disk_bytes is None else disk_bytes,
            device_bytes,
        )
    console = Output()
    with shown(console) as progress:
        found = forecast(config, rates, Question(room, arguments.largest, arguments.depth), progress)
    print_forecast(found, console, as_json=arguments.json)
    return 0


def _config(_arguments: argparse.Namespace) -> int:
    Output().print(config_template(), soft_wrap=True, highlight=False, markup=False, end="")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    max_shard_bytes = _size("--max-shard", arguments.max_shard)
    if max_shard_bytes < 1:
        raise ConfigError(f"--max-shard is {arguments.max_shard}; it must be at least 1 byte")
    export_run(
        arguments.run, arguments.to, paths=arguments.paths, commit=arguments.commit, dtype=arguments.dtype,
        max_shard_bytes=max_shard_bytes, console=Output(),
    )  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = verify_run(arguments.run, paths=arguments.paths, commit=arguments.commit, console=Output())
    return 0 if report.whole else 1


def _bench_ssd(arguments: argparse.Namespace) -> int:
    try:
        plan = full_plan(_size("--size", arguments.size), arguments.seconds)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    run_bench_ssd(arguments.paths, plan, Output(), as_json=arguments.json)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.file is None and arguments.changes:
        raise ConfigError("--set changes a FILE; name one")
    file = None if arguments.file is None else Path(arguments.file)
    return run_doctor(file, Output(), changes=arguments.changes, bench=arguments.bench, as_json=arguments.json)


def _size(option: str, text: str) -> int:
    """The bytes that an option names.

    Raises:
        ConfigError: it is no size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


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
        code: int = arguments.call(arguments)
        if arguments.owns_process:
            only_exit_is_left()
        return code
    except (OffloadError, ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        where = "" if isinstance(error, (OffloadError, ConfigError)) else " (--debug shows where)"
        for line in (str(error) or type(error).__name__).splitlines():
            print(f"offload: error: {line}{where}", file=sys.stderr)
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
