"""Hooks that the engine puts on modules, and the refusal of what would look through them."""
