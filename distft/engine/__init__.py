"""What a training step means on this hardware. `local` is the reference: plain torch, every rank holds the whole model."""
