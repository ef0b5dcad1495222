"""CTranslate2 alone in a process, for benchmarks/peers/m2m_100.py: answers the calls that come through standard input.

python benchmarks/peers/translating.py DIRECTORY COMPUTE_TYPE THREADS
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

import ctranslate2


def answer(value: Any) -> None:
    pickle.dump(value, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def main() -> None:
    directory, compute_type, num_threads = sys.argv[1:]
    translator = ctranslate2.Translator(
        directory, device="cpu", compute_type=compute_type, intra_threads=int(num_threads)
    )
    answer(None)
    while True:
        try:
            sources, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer([result.hypotheses[0] for result in translator.translate_batch(sources, **options)])


if __name__ == "__main__":
    main()
