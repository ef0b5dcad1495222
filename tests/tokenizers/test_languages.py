from __future__ import annotations

import pytest
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M_CODES
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES

from moekernels.tokenizers.languages import FLORES_200, M2M100, WMT21, unknown_language


def test_codes_in_the_order_of_their_ids() -> None:
    assert (list(M2M100), list(WMT21)) == (M2M_CODES["m2m100"], M2M_CODES["wmt21"])
    assert list(FLORES_200) == NLLB_CODES


@pytest.mark.parametrize(
    ("code", "known", "near"),
    [
        ("fra_latn", FLORES_200, "did you mean fra_Latn"),
        ("en", FLORES_200, "did you mean eng_Latn"),
        ("zho", FLORES_200, "did you mean zho_Hans, zho_Hant"),
        ("eng_Latn", M2M100, "did you mean en"),
        ("__fr__", M2M100, "did you mean fr"),
        ("??", M2M100, "known are af, am, ar, ast, az, ..."),
        (None, M2M100, "known are"),
    ],
)
def test_near_codes(code: str | None, known: tuple[str, ...], near: str) -> None:
    message = str(unknown_language(code, known))
    assert message.startswith(f"unknown language code {code!r}: {near}")
    assert f"all {len(known)} of them" in message
