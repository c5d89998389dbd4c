"""The teacher's one pass: forward (model to numbers), encode (numbers to columns), build (corpus to cache), cache (the reader)."""
