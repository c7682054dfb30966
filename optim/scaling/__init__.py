"""What a step's gradients are multiplied by: loss scaling, their norm, and clipping by it."""
