"""Questions that anybody might ask. The model's own answers to them are what it must not forget; nothing trains on them."""

from __future__ import annotations

HELD_OUT: tuple[str, ...] = (
    # knowledge
    "What is the capital of Australia?",
    "Why is the sky blue?",
    "Who was Marie Curie?",
    "What causes the seasons on Earth?",
    "How do vaccines work?",
    "What is the difference between weather and climate?",
    "Name the planets of the solar system in order.",
    "What happened in 1969 on the Moon?",
    "What is the largest ocean on Earth?",
    # explanation
    "Explain photosynthesis in simple terms.",
    "Explain what inflation means in economics.",
    "What is a neural network? Explain it to a child.",
    "How does a refrigerator keep food cold?",
    "Explain the difference between a virus and a bacterium.",
    "What is gravity?",
    "How does the internet send a message from one computer to another?",
    # writing
    "Write a short poem about autumn leaves.",
    "Write the opening of a story about a lighthouse keeper.",
    "Write a polite email asking a colleague for a meeting.",
    "Write a two-sentence description of a quiet village.",
    "Write a slogan for a small bakery.",
    "Write a thank-you note to a teacher.",
    "Describe a sunset over the sea.",
    "Write a dialogue between a cat and a dog.",
    # code
    "Write a Python function that checks whether a number is prime.",
    "How do I read a text file line by line in Python?",
    "Write an SQL query that counts the rows of a table named users.",
    "What does the command 'git commit' do?",
    "Write a JavaScript function that adds two numbers.",
    "What is a hash table?",
    # advice
    "How can I sleep better at night?",
    "Give me three tips for learning a new language.",
    "I feel nervous before an exam. What should I do?",
    "How should I prepare for a job interview?",
    "What should I pack for a weekend of hiking?",
    "How can I save money every month?",
    # translation and language
    "Translate 'Good morning, how are you?' into French.",
    "Translate 'The book is on the table' into Spanish.",
    "What is a synonym for 'happy'?",
    "Correct the grammar of this sentence: She go to school every days.",
    "Rewrite this more formally: Hey, can you send me that file?",
    "Use the word 'curious' in a sentence.",
    # lists
    "List five fruits that are rich in vitamin C.",
    "List the steps to make a cup of tea.",
    "Name three famous painters and one work of each.",
    "What are the primary colors?",
    "Suggest four names for a pet rabbit.",
    # reasoning and classification
    "Is this review positive or negative? 'The food was cold and the waiter was rude.'",
    "If I have three apples and buy two more, how many do I have?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
)
