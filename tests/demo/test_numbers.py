"""Spellings that the rules of each language get wrong first."""

from __future__ import annotations

import pytest

from moekernels.demo.numbers import LANGUAGES, LIMIT, english, french, german


@pytest.mark.parametrize(
    ("number", "in_english", "in_french", "in_german"),
    [
        (0, "zero", "zéro", "null"),
        (1, "one", "un", "eins"),
        (16, "sixteen", "seize", "sechzehn"),
        (17, "seventeen", "dix-sept", "siebzehn"),
        (21, "twenty-one", "vingt et un", "einundzwanzig"),
        (30, "thirty", "trente", "dreißig"),
        (71, "seventy-one", "soixante et onze", "einundsiebzig"),
        (76, "seventy-six", "soixante-seize", "sechsundsiebzig"),
        (80, "eighty", "quatre-vingts", "achtzig"),
        (81, "eighty-one", "quatre-vingt-un", "einundachtzig"),
        (99, "ninety-nine", "quatre-vingt-dix-neuf", "neunundneunzig"),
        (100, "one hundred", "cent", "einhundert"),
        (101, "one hundred and one", "cent un", "einhunderteins"),
        (200, "two hundred", "deux cents", "zweihundert"),
        (217, "two hundred and seventeen", "deux cent dix-sept", "zweihundertsiebzehn"),
        (1000, "one thousand", "mille", "eintausend"),
        (1001, "one thousand and one", "mille un", "eintausendeins"),
        (1100, "one thousand one hundred", "mille cent", "eintausendeinhundert"),
        (2080, "two thousand and eighty", "deux mille quatre-vingts", "zweitausendachtzig"),
        (4291, "four thousand two hundred and ninety-one", "quatre mille deux cent quatre-vingt-onze",
         "viertausendzweihunderteinundneunzig"),
    ],
)  # fmt: skip
def test_spelling(number: int, in_english: str, in_french: str, in_german: str) -> None:
    assert (english(number), french(number), german(number)) == (in_english, in_french, in_german)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_numbers_are_spelled_alike(language: str) -> None:
    assert len({LANGUAGES[language](number) for number in range(LIMIT)}) == LIMIT
