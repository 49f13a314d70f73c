"""Absorbing-state discrete diffusion: forward process, losses and sampler."""
