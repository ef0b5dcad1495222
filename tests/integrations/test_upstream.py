"""The runner of transformers' own tests, on a small file in their place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers

from tests.integrations import run_upstream_suite
from tests.integrations.run_upstream_suite import Suite, compare, main, run_suite, version_of

# One test fails always, one with the drop-in alone; the others pass or are skipped either way.
_TESTS = """
import unittest

import torch
import transformers


def small():
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1))


def ours(model):
    return any(hasattr(module, "swap") for module in model.modules())


class OlmoeModelTest(unittest.TestCase):
    def test_forward(self):
        self.assertEqual(small()(input_ids=torch.arange(6)[None]).logits.shape, (1, 6, 32))

    def test_always_fails(self):
        self.fail()

    def test_is_stock(self):
        self.assertFalse(ours(small()))

    def test_skipped(self):
        self.skipTest("for no reason")

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            self.assertFalse(ours(small()))

    def test_loaded(self):
        import tempfile
        with tempfile.TemporaryDirectory() as directory:
            model = small()
            model.save_pretrained(directory)
            self.assertEqual(ours(type(model).from_pretrained(directory)), ours(model))

    def test_other_dtypes(self):
        self.assertFalse(ours(transformers.OlmoeModel._from_config(small().config, torch_dtype=torch.float64)))

    def test_excluded_IntegrationTest(self):
        raise SystemExit("must not run")
"""


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A directory with the shape of transformers' repository, and one test file."""
    directory = tmp_path / "tests" / "models" / "olmoe"
    directory.mkdir(parents=True)
    (directory / "test_modeling_olmoe.py").write_text(_TESTS)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "transformers").symlink_to(Path(transformers.__file__).parent, target_is_directory=True)
    return tmp_path


def test_the_drop_in_is_in_every_model(upstream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report names the test that fails with it alone, and the models it refused."""
    assert version_of(upstream) == transformers.__version__
    assert main(["--upstream", str(upstream), "--models", "olmoe", "--python", sys.executable]) == 1
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "| olmoe" in line]
    assert rows[0][:6] == ["olmoe", "stock", "5", "1", "1", "0"]
    assert rows[1][:5] == ["olmoe", "replace", "4", "2", "1"]
    assert int(rows[1][5]) > 0
    assert "test_is_stock is failed, and passed when stock" in out
    assert "test_always_fails" not in out
    assert "1 models stayed stock: replace_moe_layers: " in out and "float64" in out


def test_what_cannot_run_is_an_error(upstream: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)for olmoe \(sideways\).*must be one of stock, replace, register"):
        run_suite(Path(sys.executable), upstream, "olmoe", "sideways")


def test_comparison() -> None:
    def suite(calls: int = 1, **outcomes: str) -> Suite:
        return Suite("phimoe", "replace", {f"file::{test}": is_ for test, is_ in outcomes.items()}, calls, {}, 1.0)

    stock = suite(test_a="passed", test_b="failed", test_c="skipped", test_d="passed", test_tied_weights_keys="passed")
    same = suite(test_a="passed", test_b="passed", test_c="skipped", test_d="passed", test_tied_weights_keys="passed")
    assert compare(stock, same) == ([], [])
    ignored = suite(calls=0, **{test.partition("::")[2]: outcome for test, outcome in stock.outcomes.items()})
    assert compare(stock, ignored) == (["phimoe (replace): no call reached our kernels"], [])
    wrong, intended = compare(stock, suite(test_a="failed", test_b="failed", test_c="failed", test_e="failed"))
    assert [line.partition("::")[2].split()[0] for line in wrong] == ["test_a", "test_c", "test_d", "test_e"]
    assert [line.partition("::")[2].split()[0] for line in intended] == ["test_tied_weights_keys"]


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkout of transformers"):
        run_upstream_suite.main(["--upstream", str(tmp_path)])
