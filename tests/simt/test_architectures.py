"""What of a build runs on which GPU, and what is said where nothing does."""

from __future__ import annotations

import pytest
import torch

from moekernels._library import _C
from moekernels.cli import info
from tests.simt.build import KERNELS
from tests.simt.device import Settings, Simt

DEFAULT = "80-real 86-real 89 90a-real"


@pytest.mark.parametrize(
    ("built", "capability", "code"),
    [
        (DEFAULT, 80, "sm_80"),
        (DEFAULT, 86, "sm_86"),
        (DEFAULT, 87, "sm_86"),
        (DEFAULT, 89, "sm_89"),
        (DEFAULT, 90, "sm_90a"),
        (DEFAULT, 100, "PTX of sm_89"),
        (DEFAULT, 120, "PTX of sm_89"),
        (DEFAULT, 75, ""),
        ("90a", 90, "sm_90a"),
        ("90a", 100, ""),  # what is for Hopper alone stays there
        ("80-real 90a-real", 100, ""),
        ("80 90a-real", 100, "PTX of sm_80"),
        ("90 90a", 90, "sm_90a"),
        ("80-virtual", 80, "PTX of sm_80"),
        ("100f", 103, "sm_100f"),
        ("100f", 120, ""),
        ("120-real", 121, "sm_120"),
        ("", 90, ""),
    ],
)
def test_code_for_a_device(built: str, capability: int, code: str) -> None:
    assert _C.cuda_code_for(built, capability) == code


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        (75, "; this build has code for 80-real 89, and the GPU is sm_75: build with MOEKERNELS_CUDA_ARCHS=75"),
        (80, ""),
        (120, ""),
    ],
)
def test_an_error_names_the_missing_architecture(simt: Simt, capability: int, said: str) -> None:
    library = simt.library("common/error.cu", KERNELS / "describe.cu", defines=('MOEKERNELS_CUDA_ARCHS="80-real 89"',))
    text = torch.zeros(400, dtype=torch.uint8)
    library.call("describe_error", 209, text, 400, settings=Settings(compute_capability=capability))
    message = bytes(text.tolist()).rstrip(b"\0").decode()
    assert message == f"cudaError 209: as the emulator calls it{said}"


def test_info_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "build_info", lambda: {"cuda_archs": DEFAULT.split()})
    device = {"device": "cuda:0", "name": "A GPU", "arch": "sm_100", "memory_gib": 180.0}
    described = info._described({**device, "code": info.code_for(10, 0)})
    assert described == "cuda:0: A GPU, sm_100, 180.0 GiB, runs PTX of sm_89"
    described = info._described({**device, "code": info.code_for(7, 5)})
    assert described.endswith("GiB, no CUDA kernels for it in this build")
