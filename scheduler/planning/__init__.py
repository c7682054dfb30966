"""Pure planning: traces, plans, bounds, simulation. No thread, file, device or process group."""
