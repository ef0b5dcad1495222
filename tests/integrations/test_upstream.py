"""The runner of transformers' own tests, on a small file in their place."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers
from torch import nn

from tests.integrations import run_upstream_suite, upstream_plugin
from tests.integrations.run_upstream_suite import Suite, compare, main, release_of, run_suite, version_of

# One test fails always, three with the drop-in alone: one of them as expected, and one of that name for another reason.
# The others pass or are skipped either way.
_TESTS = """
import unittest
import unittest.mock

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

    def test_eager_matches_batched_and_grouped_inference_1_fp16(self):
        self.assertFalse(ours(small()), "for another reason")

    def test_eager_matches_batched_and_grouped_inference_0_fp32(self):
        mock = unittest.mock.Mock()
        if not ours(small()):
            mock()
        mock.assert_called()

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


def test_the_drop_in_is_in_every_model(upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report names the test that fails with it alone, and the models it refused."""
    assert version_of(upstream) == transformers.__version__
    raw = tmp_path / "raw"
    options = ["--upstream", str(upstream), "--models", "olmoe", "--python", sys.executable, "--save", str(raw)]
    assert main(options) == 1
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "| olmoe" in line]
    assert rows[0][:6] == ["olmoe", "stock", "7", "1", "1", "0"]
    assert rows[1][:5] == ["olmoe", "replace", "4", "4", "1"]
    assert int(rows[1][5]) > 0
    assert "test_is_stock is failed, and passed when stock" in out
    assert "test_always_fails" not in out
    assert "inference_1_fp16 is failed, and passed when stock: AssertionError: True is not false : for another" in out
    (intended,) = (line for line in out.splitlines() if line.startswith("intended: "))
    assert "inference_0_fp32 is failed" in intended and intended.endswith("ours are instead")
    assert "1 models stayed stock: replace_moe_layers: " in out and "float64" in out
    saved = json.loads((raw / "olmoe-replace.json").read_text())
    assert Counter(saved["outcomes"].values()) == {"passed": 4, "failed": 4, "skipped": 1}
    assert len(saved["messages"]) == 4 and saved["calls"] == int(rows[1][5])


def test_models_of_any_type_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without experts is nothing to tell of, one whose experts are unknown is."""

    class SomeMoE(nn.Linear):
        pass

    for name in ("replaced", "refused"):
        monkeypatch.setattr(upstream_plugin, name, Counter())
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    upstream_plugin._replace(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    assert not upstream_plugin.replaced and not upstream_plugin.refused
    upstream_plugin._replace(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))
    assert upstream_plugin.replaced and not upstream_plugin.refused
    upstream_plugin._replace(nn.Sequential(SomeMoE(2, 2)))
    (message,) = upstream_plugin.refused
    assert "unknown: 0 (SomeMoE)" in message


def test_what_cannot_run_is_an_error(upstream: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)for olmoe \(sideways\).*must be one of stock, replace, register"):
        run_suite(Path(sys.executable), upstream, "olmoe", "sideways")


def test_comparison() -> None:
    def suite(calls: int = 1, **outcomes: str) -> Suite:
        return Suite("phimoe", "replace", {f"file::{test}": is_ for test, is_ in outcomes.items()}, {}, calls, {}, 1.0)

    stock = suite(test_a="passed", test_b="failed", test_c="skipped", test_d="passed")
    same = suite(test_a="passed", test_b="passed", test_c="skipped", test_d="passed")
    assert compare(stock, same) == ([], [])
    ignored = suite(calls=0, **{test.partition("::")[2]: outcome for test, outcome in stock.outcomes.items()})
    assert compare(stock, ignored) == (["phimoe (replace): no call reached our kernels"], [])
    wrong, intended = compare(stock, suite(test_a="failed", test_b="failed", test_c="failed", test_e="failed"))
    assert [line.partition("::")[2].split()[0] for line in wrong] == ["test_a", "test_c", "test_d", "test_e"]
    assert intended == []


_MOCK = "test_eager_matches_batched_and_grouped_inference_2_bf16"
_CALLED = "AssertionError: Expected 'mock' to have been called."


@pytest.mark.parametrize(
    ("test", "message", "expected"),
    [
        (_MOCK, _CALLED, True),
        (_MOCK, "AssertionError: Expected 'mock' to not have been called. Called 1 times.", False),
        (_MOCK, "RuntimeError: grouped_gemm: x must be contiguous", False),
        (_MOCK, "", False),
        ("test_forward", _CALLED, False),
    ],
)
def test_only_the_expected_cause_is_intended(test: str, message: str, expected: bool) -> None:
    def suite(way: str, outcome: str) -> Suite:
        messages = {f"file::{test}": message} if outcome == "failed" else {}
        return Suite("phimoe", way, {f"file::{test}": outcome}, messages, 1, {}, 1.0)

    wrong, intended = compare(suite("stock", "passed"), suite("replace", "failed"))
    assert (len(wrong), len(intended)) == ((0, 1) if expected else (1, 0))
    # Neither a test that did not run, nor one of another way.
    for ours in (suite("replace", "skipped"), suite("register", "failed")):
        wrong, intended = compare(suite("stock", "passed"), ours)
        assert (len(wrong), intended) == (1, [])


def test_a_commit_between_releases() -> None:
    assert (release_of("5.16.0.dev0"), release_of("5.16.0"), release_of("4.56.2")) == ("5.16.0", "5.16.0", "4.56.2")


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkout of transformers"):
        run_upstream_suite.main(["--upstream", str(tmp_path)])
