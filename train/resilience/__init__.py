"""What breaks, and how a run survives it: bad steps, replicas, signals, launch, wall time."""
