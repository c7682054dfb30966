"""The planner: a reader that runs ahead through the trace of a step, and the plan made of what it decides."""
