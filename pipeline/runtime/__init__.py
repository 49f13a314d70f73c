"""What a run computes with: device, processes, random seeds, terminal."""
