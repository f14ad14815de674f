"""Random words of three languages in three scripts."""

import random

LETTERS = {"de": "abcdeäöüß", "ru": "абвгдежз", "ko": "가나다라마바사"}


def random_texts(seed: int, texts: int = 40, words: int = 30) -> dict[str, list[str]]:
    """Language -> texts of random words in the language's own letters."""
    draw = random.Random(seed)
    return {
        language: [
            " ".join("".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(draw.randint(1, words)))
            for _ in range(texts)
        ]
        for language, letters in LETTERS.items()
    }
