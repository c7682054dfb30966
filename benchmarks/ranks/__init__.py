"""Several ranks on one machine, beside FSDP2."""
