"""Models that answer prompts."""
