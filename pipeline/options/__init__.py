"""The options of a call: their declaration, presets, command line, and what they come to for a run."""
