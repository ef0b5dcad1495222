"""What happens when the compiled part is broken, old or meets the wrong torch: one sentence that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moekernels
from moekernels._settings import _CPU_ISAS
from tests.isa import ALL_ISAS


def import_copy(directory: Path, code: str = "import moekernels") -> str:
    """Import the package from `directory` in a new interpreter and return the last line it prints to stderr."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(directory)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=directory,
    )
    assert result.returncode == 0 or result.stderr, f"the interpreter died without a word ({result.returncode})"
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package that a test may break."""
    source = Path(moekernels.__file__).parent
    if not list(source.glob("_C*.so")):
        pytest.skip("an editable install keeps its compiled part elsewhere")
    return Path(shutil.copytree(source, tmp_path / "moekernels"))


def test_a_sound_copy_imports(package: Path) -> None:
    assert import_copy(package.parent) == ""


def test_ops_library_is_broken(package: Path) -> None:
    (package / "libmoekernels_torch.so").write_bytes(b"not a library" * 100)
    message = import_copy(package.parent)
    assert "ImportError: moekernels: libmoekernels_torch.so could not be loaded" in message
    assert f"built against torch {moekernels.build_info()['torch_built']}" in message and "Reinstall" in message


def test_compiled_module_is_missing(package: Path) -> None:
    for module in package.glob("_C*.so"):
        module.rename(package / "_C.cpython-27m.so")
    message = import_copy(package.parent)
    assert "compiled module _C could not be imported by Python" in message
    assert "found: _C.cpython-27m.so" in message and "Reinstall" in message


def test_compiled_module_is_of_another_version(package: Path) -> None:
    (package / "_version.py").write_text('__version__ = "99.0.0"\n')
    message = import_copy(package.parent)
    assert "the Python files are version 99.0.0, but the compiled module is" in message and "Reinstall" in message


def test_torch_is_too_old(package: Path) -> None:
    message = import_copy(package.parent, "import torch; torch.__version__ = '2.9.1+cpu'; import moekernels")
    assert "built for torch 2.11 and newer, but torch 2.9.1+cpu is running" in message
    assert "pip install 'torch>=2.11'" in message


def test_build_info_is_complete() -> None:
    info = moekernels.build_info()
    assert info["version"] == moekernels.__version__
    assert info["cpu_isa"] in info["cpu_isas"] and info["cpu_isas"][0] == "portable"
    assert bool(info["cuda_archs"]) == bool(info["cuda_compiler"]) == (not info["cuda_reason"])
    assert info["cxx_compiler"] and info["git_revision"] and info["torch_built"] and info["torch_running"]


def test_cpu_isa_is_restored_and_checked() -> None:
    before = moekernels.build_info()["cpu_isa"]
    with moekernels.cpu_isa("portable"):
        assert moekernels.build_info()["cpu_isa"] == "portable"
    assert moekernels.build_info()["cpu_isa"] == before
    with pytest.raises(ValueError, match=r"must be one of portable.*got 'sse9'"), moekernels.cpu_isa("sse9"):
        pass


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_environment_makes_it_a_lesser_processor(isa: str) -> None:
    code = """
import moekernels
from moekernels._settings import _CPU_ISAS
from tests.isa import ALL_ISAS
info = moekernels.build_info()
print(*info["cpu_isas"])
assert info["cpu_isa"] == info["cpu_isas"][-1]
try:
    with moekernels.cpu_isa("amx"):
        assert info["cpu_isa"] == "amx"
except ValueError as error:
    assert info["cpu_isa"] != "amx" and "must be one of" in str(error)
"""
    environment = {**os.environ, "MOEKERNELS_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    present = moekernels.build_info()["cpu_isas"]
    assert run.stdout.split() == present[: ALL_ISAS.index(isa) + 1]


def test_batch_invariant_switches_and_restores() -> None:
    assert not moekernels.is_batch_invariant()
    with moekernels.batch_invariant():
        assert moekernels.is_batch_invariant()
    assert not moekernels.is_batch_invariant()
    moekernels.batch_invariant(True)
    assert moekernels.is_batch_invariant()
    moekernels.batch_invariant(False)
    assert not moekernels.is_batch_invariant()


def test_tile_choice_can_be_asked_without_a_gpu() -> None:
    from moekernels import _C

    olmoe = dict(out_features=2048, in_features=2048, num_experts=64, gated=True, gathered=True)
    assert _C.describe_tiles(num_rows=8, **olmoe).startswith("decode ")
    assert _C.describe_tiles(num_rows=8 * 32768, **olmoe).startswith("sm90 128x256x64")
    assert _C.describe_tiles(num_rows=8 * 32768, compute_capability=80, **olmoe).startswith("sm80 128x128x32")
    assert _C.describe_tiles(num_rows=8 * 32768, dtype="float32", **olmoe).startswith("f32 ")
    down = dict(out_features=1024, in_features=2048, num_experts=64, transposed=True)
    assert _C.describe_tiles(num_rows=8, **down).startswith("sm90 128x128x64")
    weight = dict(num_rows=65536, out_features=2048, in_features=2048, num_experts=64)
    assert _C.describe_weight_grad_tiles(**weight).startswith("sm90 128x256x64")
    assert _C.describe_weight_grad_tiles(compute_capability=80, **weight).startswith("sm80 128x128x32")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16; got 'int8'"):
        _C.describe_tiles(num_rows=8, dtype="int8", **olmoe)


def test_import_leaves_torchs_compiler_alone() -> None:
    """It takes longer to import than everything here."""
    code = "import sys, torch, moekernels; moekernels.pipeline; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_import_brings_models_when_they_are_used() -> None:
    code = """
import sys, moekernels
parts = ["tokenizers", "generation", "models", "pipelines"]
print([part for part in parts if f"moekernels.{part}" in sys.modules])
moekernels.AutoTokenizer
print([part for part in parts if f"moekernels.{part}" in sys.modules])
print(all(getattr(moekernels, part).__name__ == f"moekernels.{part}" for part in parts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['tokenizers']\nTrue\n"


def test_every_public_name_is_that_of_its_part() -> None:
    parts = [moekernels.tokenizers, moekernels.generation, moekernels.models, moekernels.pipelines]
    for name in moekernels.__all__:
        value = getattr(moekernels, name)
        homes = [part for part in parts if name in part.__all__]
        assert all(value is getattr(part, name) for part in homes), name
        assert homes or name in vars(moekernels), name
        assert name in dir(moekernels)
    with pytest.raises(AttributeError, match="module 'moekernels' has no attribute 'AutoModelForNothing'"):
        moekernels.AutoModelForNothing  # noqa: B018


def test_an_unknown_instruction_set_in_the_environment() -> None:
    env = {**os.environ, "MOEKERNELS_CPU_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", "import moekernels"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.endswith("must be one of portable, avx2, avx512, avx512_bf16, amx, got 'avx3'\n")


def test_every_instruction_set_has_its_name_in_the_environment() -> None:
    assert _CPU_ISAS == ALL_ISAS
