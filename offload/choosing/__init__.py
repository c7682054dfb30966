"""Which updates a run has, where it leaves that open, and what a program calls first."""
