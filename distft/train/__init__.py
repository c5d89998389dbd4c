"""The training run: what each step consumes (batches), the story (loop), and all that lets it stop and go on."""
