"""Sets of options that go together; see docs/experiments.md for what each of them brought."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "improved": {
        "spike_steps": 4,
        "downsampling": 2,
        "embedding_dim": 8,
        "clipped_error": True,
        "revive_codes": True,
        "batch_size": 64,
        "lr": 4e-3,
        "lr_schedule": "cosine",
        "ema_decay": 0.999,
        "epochs": 5,
        "denoiser": "residual",
        "denoiser_spike_steps": 2,
        "denoiser_channels": 192,
        "denoiser_blocks": 4,
        "condition": "both",
        "diffusion_lr": 6e-3,
        "loss": "spread_cross_entropy",
        "fixed_norm": 0.4,
        "diffusion_epochs": 16,
        "reveal_order": "spread",
        "sample_steps": 28,
        "temperature": 1.0,
        "final_temperature": 0.8,
    },
}
