"""Native kernels and their build."""
