"""What is trained: rules that turn signals into weights per token (catalog), and the one loss that obeys them."""
