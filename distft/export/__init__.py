"""From CHECKPOINTS to MODEL: a folder that transformers loads, written as it is read, with a card that says how it came about."""
