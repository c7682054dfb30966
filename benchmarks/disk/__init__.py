"""The page files against fio and plain loops, and what moving bytes costs the compute beside it."""
