"""Tasks with an answer: RULER's synthetic ones, a chat of several turns, and questions from a file."""
