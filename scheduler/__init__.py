"""When things happen: the trace of a step, the plan made from it, its check and simulation, and the driver that follows
it."""
