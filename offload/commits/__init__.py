"""What a commit says of the model, and the commits a run's folders hold."""
