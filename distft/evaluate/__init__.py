"""Did it learn, and what did it lose: tasks before and after, and drift. Every answer is kept."""
