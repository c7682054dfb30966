"""Carries out a plan while a step runs: lanes, pins, waits."""
