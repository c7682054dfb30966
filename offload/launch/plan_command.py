"""What ``offload plan`` does with its options."""

from __future__ import annotations

import argparse
from dataclasses import replace

from offload.budget.verdict import Available
from offload.choosing.update_choice import choose_updates
from offload.config import Config, ConfigError
from offload.console.output import Output
from offload.factories import model_factory
from offload.forecast.forecast import check_forecastable, forecast
from offload.forecast.planned_trace import check_trace_file, write_planned_trace
from offload.forecast.rates import Rates, rates_of
from offload.forecast.report import print_forecast, shown
from offload.machine.calibration import calibrated
from offload.machine.facts import available_here


def plan(config: Config, arguments: argparse.Namespace) -> int:
    """Forecast a configuration and print it; returns the exit status.

    Args:
        arguments: the options of ``offload plan``, by their names.

    Raises:
        ConfigError: it cannot be forecast, or options do not fit its device.
        StorageError: the trace cannot be written where it is asked for; nothing was changed.
    """
    check_forecastable(config)
    if arguments.explain_trace is not None:
        check_trace_file(arguments.explain_trace)
    _check_device_options(config, arguments)
    rates = _rates(config, arguments)
    room, console = _room(config, arguments), Output()
    with shown(console) as progress:
        explained = arguments.explain or arguments.explain_trace is not None
        if config.update.mode == "auto" and config.model is not None:
            config = choose_updates(config, model_factory(config.model), rates=rates, progress=progress)
        found = forecast(
            config,
            rates,
            room,
            largest=arguments.largest,
            depth=arguments.depth,
            explained=explained,
            progress=progress,
        )
    if arguments.explain_trace is not None:
        assert found.explained is not None
        write_planned_trace(arguments.explain_trace, found.explained)
        if not arguments.explain:
            found = replace(found, explained=None)
    print_forecast(found, console, as_json=arguments.json)
    return 0


def _rates(config: Config, arguments: argparse.Namespace) -> Rates:
    """What was given; the rest is that of this machine, unless another one's kernels are given."""
    mb_per_s = {
        "ram": arguments.ram_speed,
        "ssd_read": arguments.ssd_read,
        "ssd_write": arguments.ssd_write,
        "h2d": arguments.h2d,
        "device_ram": arguments.device_ram_speed,
        "link": arguments.link,
    }
    bytes_per_s = {name: None if value is None else value * 1e6 for name, value in mb_per_s.items()}
    machine = None
    if arguments.flops is None or arguments.ram_speed is None:  # else it is a forecast for another machine
        machine = calibrated(config.ssd.paths)
        machine.apply()
    if not 1 <= arguments.ranks <= 1 << 20:
        raise ConfigError(f"--ranks is {arguments.ranks}; give a number from 1 on")
    return rates_of(config, flops=arguments.flops, **bytes_per_s, here=machine, n_ranks=arguments.ranks)


def _room(config: Config, arguments: argparse.Namespace) -> Available | None:
    """The machine's memory and disk; None: what is free here."""
    ram_bytes, disk_bytes, device_bytes = arguments.machine_ram, arguments.machine_disk, arguments.machine_device
    if ram_bytes is disk_bytes is device_bytes is None:
        return None
    here = available_here(config)
    return Available(
        here.ram_bytes if ram_bytes is None else ram_bytes,
        here.disk_bytes if disk_bytes is None else disk_bytes,
        device_bytes,
    )


def _check_device_options(config: Config, arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that need a device which the configuration does not name, and the reverse."""
    names = ("machine_device", "h2d", "device_ram_speed", "flops", "ram_speed")
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) is not None for name in names}
    of_device = [option for option in list(given)[:3] if given[option]]
    if config.device == "cpu" and of_device:
        raise ConfigError(
            f'{of_device[0]}: device is "cpu", which has no memory of its own; --set device=cuda --set '
            "memory.device=SIZE"
        )
    missing = [option for option in given if option != "--h2d" and not given[option]]
    if config.device.startswith("cuda") and missing:
        raise ConfigError(
            f'device is "{config.device}", of which the kernels of a CPU tell nothing: give {", ".join(missing)} as '
            "well"
        )
