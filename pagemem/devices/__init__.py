"""Memory where pages lie: host arena, pinned staging, and accelerators."""
