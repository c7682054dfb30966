"""Units that are bound between uses, so that torch need not ask for their parameters."""
