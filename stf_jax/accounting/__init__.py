"""What programs cost: FLOPs, counted in traces, and the peak figures of chips."""
