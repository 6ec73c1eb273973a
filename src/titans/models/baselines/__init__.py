"""What the four models are compared with."""
