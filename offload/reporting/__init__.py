"""What is shown and kept of a launched run: progress, metrics, the loss curve and the closing table."""
