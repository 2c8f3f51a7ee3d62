"""Pictures and sound to arrays; host code, no JAX."""
