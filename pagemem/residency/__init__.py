"""Where each tensor lives: its states, moves between tiers, and versions on disk."""
