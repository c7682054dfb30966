"""Pure bookkeeping of page frames: pages, free runs, the allocator."""
