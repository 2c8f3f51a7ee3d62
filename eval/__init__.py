"""What measures parameters."""
