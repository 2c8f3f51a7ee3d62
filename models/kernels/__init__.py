"""Kernels: attention and grouped matmuls; one contract each, the best form of each platform."""
