"""Live comparison with timm, torch and transformers; skipped where they are not installed."""
