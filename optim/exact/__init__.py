"""Updates equal to plain PyTorch's, bit for bit."""
