"""Absorbing-state discrete diffusion: forward process, losses, sampler."""
