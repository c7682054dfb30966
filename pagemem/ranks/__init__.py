"""What connects the ranks of a run: their collectives, and the lane that makes them in one order."""
