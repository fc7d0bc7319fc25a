"""What the losses cost, and how we know: see README.md."""
