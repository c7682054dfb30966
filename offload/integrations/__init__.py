"""What joins the engine to the training loops of other packages; each needs the package that it is named after."""
