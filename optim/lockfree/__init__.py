"""Asynchronous updates of bounded staleness."""
