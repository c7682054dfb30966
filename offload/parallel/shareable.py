"""What works with several ranks."""

from __future__ import annotations

from offload.config import Config, ConfigError, ParallelConfig


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


def shards_of(parallel: ParallelConfig, n_ranks: int) -> int:
    """Ranks among which units are cut.

    Raises:
        ConfigError: ``shard`` and ``replicate`` do not make up so many ranks.
    """
    shard, replicate = parallel.shard, parallel.replicate
    if shard is None:
        shard = n_ranks // (replicate or 1)
    if shard * (replicate or max(1, n_ranks // shard)) != n_ranks:
        raise ConfigError(
            f"parallel.shard = {parallel.shard} and parallel.replicate = {replicate} do not make up {n_ranks} ranks; "
            "their product must be the number of ranks"
        )
    return shard


def sent_share(parallel: ParallelConfig, n_ranks: int) -> float:
    """Of the bytes of a unit, those that a rank sends when it is gathered, filled or summed, up to the rounding of
    ranges; of units with another degree than most, which are not looked at, it is another share."""
    n_shards = shards_of(parallel, n_ranks)
    if parallel.degree == "none" or n_shards == 1:
        return 2 * (n_ranks - 1) / n_ranks
    # Sums also go on to the next group, once for each gather and sum.
    return (n_shards - 1) / n_shards + (0.5 / n_shards if n_shards < n_ranks else 0.0)
