"""distft: full-weight fine-tuning against a teacher that was read once."""

__version__ = "0.1.0"
