"""What works with several ranks."""

from __future__ import annotations

from offload.config import Config, ConfigError


def check_shareable(config: Config) -> None:
    """Raise for what does not work with several ranks yet.

    Raises:
        ConfigError: names each such setting.
    """
    refused = {
        f'device = "{config.device}"': config.device != "cpu",
        f'update.mode = "{config.update.mode}"': config.update.mode != "exact",
        "update.worker = true": config.update.worker is True,
        'update.norm = "torch"': config.update.norm == "torch",
    }
    found = [setting for setting, wanted in refused.items() if wanted]
    if found:
        raise ConfigError(f"several ranks do not work with {' and '.join(found)} yet; leave it out, or use one rank")
