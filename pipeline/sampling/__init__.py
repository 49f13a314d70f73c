"""Images drawn with trained networks."""
