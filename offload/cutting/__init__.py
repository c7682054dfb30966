"""Parameters that do not fit the budget, in slices of their rows, each of which is a unit of its own."""
