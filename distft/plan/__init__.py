"""What a run would do and cost, before anything is spent: artifacts (have, stale, missing) and estimates."""
