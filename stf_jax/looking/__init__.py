"""What image tokens are made of, and what answers depend on."""
