"""Prompts for a chat: what a dense model answers to make text of its own, and what agreement is measured on.

The two lists share no prompt, so that agreement is measured on what nothing was learned from.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pruned_vllm.common.errors import InputError

# What agreement with the dense model is measured on: a first part of them is as varied as the whole.
AGREEMENT_PROMPTS = (
    "Name three colors.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
    "Explain in one sentence what a dictionary in Python is.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Hello! How are you?",
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "List the days of the week.",
    "What is the opposite of hot?",
    "How do I boil an egg?",
    "Write a Python function that reverses a string.",
    "Summarize the story of Cinderella in two sentences.",
    "What is the largest planet in the solar system?",
    "Give me three tips for a better night's sleep.",
    "Correct this sentence: She go to school every day.",
    "What should I wear when it rains?",
    "How many legs does a spider have?",
    "Write a polite email that declines an invitation.",
    "What language is spoken in Brazil?",
    "Finish this sentence: The early bird",
    "Is a tomato a fruit or a vegetable?",
    "Tell me a joke about a cat.",
    "Convert 100 centimeters to meters.",
    "What does DNA stand for?",
    "Suggest a name for a small blue fish.",
    "Describe a forest in the morning.",
    "Who was the first person on the Moon?",
    "How does a bicycle stay upright?",
    "Write a slogan for a bakery.",
    "What is the chemical symbol of gold?",
    "Give a synonym for 'happy'.",
    "Plan one day in London.",
    "What comes next: 2, 4, 8, 16?",
    "What is the difference between a lake and a river?",
    "Write a birthday wish for my grandmother.",
    "How can I remove a coffee stain from a shirt?",
    "In which year did the Second World War end?",
    "Make a shopping list for a picnic.",
    "What is machine learning?",
    "Rewrite more formally: Hey, can you send me that file?",
    "What do bees make?",
    "Write the first two lines of a story about a lost key.",
    "If I have 12 apples and give away 5, how many are left?",
    "What are the primary colors?",
    "Explain what a loop is in programming.",
    "What is your favorite season and why?",
)

# What a model is asked to make text: every task about every subject, and the single ones.
_TASKS = (
    "What is {}?",
    "Explain {} to a child.",
    "Tell me three facts about {}.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Why does {} matter?",
    "What do most people get wrong about {}?",
    "Write a short paragraph about {}.",
    "Give a short history of {}.",
    "What would the world be like without {}?",
    "Write a conversation between two friends about {}.",
    "Make a quiz of five questions about {}, with answers.",
    "How would you begin to learn about {}?",
    "List five words that have to do with {} and define them.",
    "What are good and bad sides of {}?",
    "Write a headline and the first sentence of a news article about {}.",
    "Describe {} in one sentence.",
    "Compare {} with something similar.",
)
_SUBJECTS = (
    *("gravity", "the water cycle", "photosynthesis", "electricity", "volcanoes", "the human heart", "vaccines"),
    *("climate", "the Moon", "magnets", "dinosaurs", "whales", "honey", "rice", "coffee", "chocolate", "bread"),
    *("soccer", "chess", "swimming", "the violin", "jazz", "painting", "photography", "the theater", "poetry"),
    *("the printing press", "ancient Egypt", "the Roman Empire", "the Silk Road", "the railway", "money", "taxes"),
    *("democracy", "friendship", "honesty", "sleep", "exercise", "breakfast", "public transport", "bicycles"),
    *("computers", "the internet", "sorting algorithms", "databases", "passwords", "robots", "satellites"),
    *("mountains", "deserts", "islands", "Japan", "Kenya", "Mexico", "Paris", "New York", "libraries", "schools"),
    *("prime numbers", "fractions", "triangles", "probability", "gardens", "winter", "holidays", "dogs", "horses"),
)
_SINGLE = (
    *("Hi!", "Hello, can you help me?", "Good evening. Who are you?", "Thank you!", "What can you do?"),
    *("What is 15 + 27?", "What is 9 times 6?", "What is 144 divided by 12?", "What is 20 percent of 50?"),
    "A train travels 60 miles in one hour. How far does it travel in three hours?",
    "Tom is 5 years older than Ann, who is 9. How old is Tom?",
    *("Round 3.14159 to two decimals.", "Is 91 a prime number?", "Solve x + 4 = 10.", "Count from 1 to 10."),
    *("Write a Python function that adds two numbers.", "Write a Python loop that prints 1 to 5."),
    *("What does this code print? print(2 ** 3)", "How do I read a file in Python?", "Write HTML for a link."),
    *("Write an SQL query that counts the rows of a table.", "What is a variable?", "What is recursion?"),
    *("Fix this code: for i in range(3) print(i)", "What is the difference between a list and a tuple?"),
    *("Translate 'thank you' into French.", "Translate 'water' into German.", "How do you say 'friend' in Italian?"),
    *("Correct this sentence: He have two cat.", "Make this shorter: I am writing in order to ask you for help."),
    *("Give a synonym for 'big'.", "What is the opposite of 'early'?", "Use the word 'although' in a sentence."),
    *("What is the plural of 'mouse'?", "Is 'run' a verb or a noun?", "Rewrite politely: Give me the report."),
    *("What is the capital of Italy?", "What is the capital of Canada?", "Which is the longest river in Africa?"),
    *("Who painted the Mona Lisa?", "Who invented the telephone?", "When did the Titanic sink?"),
    *("How many continents are there?", "What is the boiling point of water?", "Which planet is closest to the Sun?"),
    *("How many minutes are in two hours?", "What do pandas eat?", "How many strings does a guitar have?"),
    *("How do I make tea?", "How do I cook pasta?", "What can I cook with potatoes and cheese?"),
    *("How do I tie a tie?", "How do I change a tire?", "How do I write a good résumé?", "How can I save money?"),
    *("How can I learn faster?", "How can I stop worrying?", "Give me an idea for a birthday present."),
    *("Write a thank-you note to a teacher.", "Write an email that asks for a day off.", "Write a short apology."),
    *("Write an advertisement for a used car.", "Write a tweet about a rainy day.", "Write a limerick."),
    *("Tell me a joke.", "Tell me a riddle.", "Tell me a fun fact.", "Sing me a song.", "Give me a quote."),
    *("List five animals.", "List four fruits.", "Name two oceans.", "Name three countries in Asia."),
    *("Name four musical instruments.", "List the months of the year.", "List three inventors and their inventions."),
    *("Classify as positive or negative: I loved this film.", "Classify as spam or not: You have won a prize!"),
    *("Finish this sentence: Once upon a time", "Finish this sentence: A picture is worth", "Invent a new holiday."),
    "Summarize: The fox wanted the grapes, but could not reach them, so he said that they were sour.",
    "Find the names in this text: Maria met Peter in Berlin on Monday.",
    "Put in order of size: an elephant, an ant, a dog.",
    *("Should I learn to drive?", "Do you have feelings?", "What is the meaning of life?", "Can fish sleep?"),
    *("Quelle est la capitale de l'Espagne ?", "Was ist ein Apfel?", "¿Qué hora es en Tokio si en Londres son las 12?"),
)
GENERATION_PROMPTS = (*_SINGLE, *(task.format(subject) for task in _TASKS for subject in _SUBJECTS))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, ready to be answered: through the chat template if there is one, else as plain text.

    Raises:
        InputError: the template cannot be used, or the tokenizer finds no tokens.
    """
    if not tokenizer.chat_template:
        found = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        try:
            found = [
                tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
                for turn in turns
            ]
        except Exception as error:  # templates are programs
            raise InputError(f"the model's chat template cannot be used: {type(error).__name__}: {error}") from error
    if not all(found):
        raise InputError("the tokenizer finds no tokens in a prompt; are its files in the model's directory?")
    return found


def shuffled_prompts(seed: int) -> list[str]:
    """GENERATION_PROMPTS in an order that depends on the seed alone."""
    order = torch.randperm(len(GENERATION_PROMPTS), generator=torch.Generator().manual_seed(seed))
    return [GENERATION_PROMPTS[place] for place in order.tolist()]
