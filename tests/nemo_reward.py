"""A reward that random responses earn about half of the time, loaded by the pool's workers by its dotted path."""


def mostly_digits(response: str, answer: str) -> float:
    return 1.0 if 2 * sum(character.isdigit() for character in response) >= len(response) else -1.0
