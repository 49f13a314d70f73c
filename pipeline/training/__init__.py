"""The training of both stages."""
