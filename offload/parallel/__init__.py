"""Many ranks: what connects them, which part of the model each one has, and how they are arranged."""
