"""Questions that anybody might ask. The model's own answers to them are what it must not forget: those to `HELD_OUT` are only
measured, those to `REHEARSED` stand among the training data. No prompt is in both.
"""

from __future__ import annotations

REHEARSED: tuple[str, ...] = (
    # knowledge
    "What is the capital of Japan?",
    "Why do leaves change colour in autumn?",
    "Who was Isaac Newton?",
    "What is the longest river in the world?",
    "How do airplanes fly?",
    "What is the difference between a planet and a star?",
    "What is the water cycle?",
    "Why is the sea salty?",
    # explanation
    "Explain what a computer program is.",
    "Explain supply and demand in simple words.",
    "How does a battery work?",
    "What is DNA? Explain it to a child.",
    "How do plants take in water?",
    "What does a doctor do during a check-up?",
    # writing
    "Write a short poem about the sea.",
    "Write the beginning of a story about a lost dog.",
    "Write a short email to thank a friend for a gift.",
    "Describe a busy market in two sentences.",
    "Write a birthday message for a colleague.",
    "Write a headline for an article about healthy eating.",
    # code
    "Write a Python function that returns the larger of two numbers.",
    "How do I write a loop in Python?",
    "What is a variable in programming?",
    "Write an SQL query that selects all rows from a table named orders.",
    # advice
    "How can I stay focused while studying?",
    "Give me three tips for cooking at home.",
    "How do I make new friends in a new city?",
    "What should I do if I lose my wallet?",
    "How can I learn to play the guitar?",
    # language
    "Translate 'Thank you very much' into French.",
    "Translate 'Where is the station?' into Spanish.",
    "What is the opposite of 'ancient'?",
    "Correct the grammar of this sentence: He don't like apples.",
    "Use the word 'brave' in a sentence.",
    # lists and reasoning
    "List five animals that live in the forest.",
    "Name three sports that are played with a ball.",
    "List the days of the week.",
    "Suggest three names for a coffee shop.",
    "Is this review positive or negative? 'I loved the music and the friendly staff.'",
    "If a train leaves at 3 pm and arrives at 5 pm, how long is the journey?",
)

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
