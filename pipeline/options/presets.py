"""Sets of options that go together; see docs/experiments.md for what each of them brought."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "improved": {
        "model": "residual-svae",
        "neuron": "fs",
        "spike_steps": 1,
        "codebook_size": 8,
        "downsampling": 2,
        "hidden_channels": 64,
        "clipped_error": True,
        "code_noise": 0.25,
        "batch_size": 64,
        "lr": 4e-3,
        "lr_schedule": "cosine",
        "ema_decay": 0.999,
        "epochs": 10,
        "denoiser": "unet",
        "denoiser_channels": 192,
        "denoiser_blocks": 4,
        "condition": "both",
        "diffusion_lr": 6e-3,
        "loss": "cross_entropy",
        "fixed_norm": 0.4,
        "int8_weights": 0.4,
        "diffusion_epochs": 16,
        "reveal_order": "spread",
        "sample_steps": 8,
        "temperature": 1.0,
        "final_temperature": 0.5,
    },
}
