"""Numbers in words, in three languages: a corpus that code can write, and that has a right translation."""

from __future__ import annotations

from collections.abc import Callable

LIMIT = 10_000

# fmt: off
_ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_FRENCH = [
    "zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze", "treize",
    "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf",
]
_FRENCH_TENS = ["vingt", "trente", "quarante", "cinquante", "soixante"]
_GERMAN = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]
_GERMAN_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
# fmt: on


def english(n: int) -> str:
    """ "four thousand two hundred and seven"."""
    if n >= 1000:
        return _joined(f"{english(n // 1000)} thousand", n % 1000, english, "and " if 0 < n % 1000 < 100 else "")
    if n >= 100:
        return _joined(f"{_ENGLISH[n // 100]} hundred", n % 100, english, "and ")
    if n < 20:
        return _ENGLISH[n]
    return _ENGLISH_TENS[n // 10 - 2] + (f"-{_ENGLISH[n % 10]}" if n % 10 else "")


def french(n: int) -> str:
    """ "quatre mille deux cent sept", with the spelling of before 1990: hyphens below a hundred only."""
    if n >= 1000:
        return _joined("mille" if n < 2000 else f"{french(n // 1000)} mille", n % 1000, french)
    if n >= 100:
        head = "cent" if n < 200 else f"{_FRENCH[n // 100]} cent{'s' if n % 100 == 0 else ''}"
        return _joined(head, n % 100, french)
    if n < 20:
        return _FRENCH[n]
    if n >= 80:
        return "quatre-vingts" if n == 80 else f"quatre-vingt-{_FRENCH[n - 80]}"
    tens, rest = (5, n - 60) if n >= 70 else (n // 10 - 1, n % 10)  # seventy is sixty and ten
    head = _FRENCH_TENS[min(tens, 5) - 1]
    if rest == 0:
        return head
    return f"{head} et {_FRENCH[rest]}" if rest in (1, 11) else f"{head}-{_FRENCH[rest]}"


def german(n: int) -> str:
    """ "viertausendzweihundertsieben": one word, the unit before the ten."""
    if n >= 1000:
        head = "ein" if n < 2000 else german(n // 1000)
        return f"{head}tausend{german(n % 1000) if n % 1000 else ''}"
    if n >= 100:
        head = "ein" if n < 200 else _GERMAN[n // 100]
        return f"{head}hundert{german(n % 100) if n % 100 else ''}"
    if n < 20:
        return _GERMAN[n]
    unit = "ein" if n % 10 == 1 else _GERMAN[n % 10]
    return f"{unit}und{_GERMAN_TENS[n // 10 - 2]}" if n % 10 else _GERMAN_TENS[n // 10 - 2]


def _joined(head: str, rest: int, spell: Callable[[int], str], link: str = "") -> str:
    return f"{head} {link}{spell(rest)}" if rest else head


# By the codes that NLLB gives the languages.
LANGUAGES: dict[str, Callable[[int], str]] = {"eng_Latn": english, "fra_Latn": french, "deu_Latn": german}
