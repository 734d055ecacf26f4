"""The device mesh, and agreement between hosts."""
