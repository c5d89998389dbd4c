"""Finished runs to one page: what they learned, how far they drifted, what they cost, and how to make them again."""
