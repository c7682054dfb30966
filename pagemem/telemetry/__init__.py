"""Events of the engine and how they are recorded."""
