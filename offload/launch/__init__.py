"""Training from a configuration file: `offload launch`."""
