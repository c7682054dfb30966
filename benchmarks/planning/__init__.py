"""What a forecast says against what a run does, and plans of models that nothing here could train."""
