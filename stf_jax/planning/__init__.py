"""What a run would need on a machine: memory, work, traffic and time."""
