"""The content of commits, and the commits in a run's folders."""
