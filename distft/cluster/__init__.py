"""Work on other processes and machines, by Ray; the only home of ray. What is done there is handed in as callables."""
