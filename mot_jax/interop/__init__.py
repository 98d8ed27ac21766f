"""Exchange with other projects: safetensors export and import, the lm-evaluation-harness."""
