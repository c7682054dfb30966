"""When ops and tasks begin and end, given bandwidths: a plan followed on paper. Pure."""
