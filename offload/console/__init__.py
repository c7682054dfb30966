"""Output to a terminal."""
