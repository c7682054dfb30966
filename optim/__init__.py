"""How parameters change: update rules over pages, gradients, clipping, exact updates and the optimizer users hold."""
