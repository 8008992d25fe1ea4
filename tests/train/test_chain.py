"""From text to a trained model and its sample with the tools as a user runs them: `make pretrain` in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megazero.train.records import read_records
from tests.harness import ROOT, rank_environment
from tests.train.command import losses, steps, torchrun, train

SIZES = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "8", "--lr", "1e-2"),
    *("--log-interval", "2", "--eval-iters", "1", "--split", "80,20"),
)


def tool(name, *flags):
    done = subprocess.run(
        [sys.executable, f"tools/{name}", *flags],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with tokenizer/ and text_document.bin/.idx, made from 60 little programs."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i * i}))\n" for i in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, tokenizer = str(folder / "corpus.jsonl"), str(folder / "tokenizer")
    tool("train_tokenizer.py", "--input", corpus, "--vocab-size", "300", "--output", tokenizer)
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    tool("preprocess_data.py", "--input", corpus, *kind, "--output-prefix", str(folder / "code"), "--append-eod")
    return folder


@pytest.fixture(scope="module")
def flags(data):
    paths = ("--data-path", str(data / "code_text_document"), "--tokenizer-model", str(data / "tokenizer"))
    return (*SIZES, *paths, "--sample-prompt", "def ", "--sample-tokens", "20")


def test_the_whole_chain_under_torchrun(tmp_path, flags):
    folder = tmp_path / "run"
    with torchrun(2, tmp_path / "log", *flags, "--output-dir", str(folder)) as run:
        assert run.wait() == 0, run.said
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints", "index-cache"),
    }
    assert (folder / "samples.txt").read_text().startswith("def ")
    assert len((folder / "samples.txt").read_text()) > len("def ")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [record["iteration"] for record in steps(folder)] == [2, 4, 6, 8]
    validations = [r["validation_loss"] for r in read_records(folder / "metrics.jsonl") if "validation_loss" in r]
    assert validations[-1] < validations[0] - 0.3
    assert "# vocab_size: 300  # derived: size of the tokenizer" in (folder / "config.yaml").read_text()
    for words in ("8 iterations, 2,048 tokens", "validation loss", "tokens/s", "MFU", "Where to look next"):
        assert run.said.count(words) >= 1, run.said
    assert run.said.count("Where to look next") == 1, "one rank alone sums up"
    assert "What the model writes:" in run.said


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, base=flags) == 0
    return folder


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_the_sample_does_not_depend_on_the_layout(tmp_path, flags, alone, axis):
    with torchrun(2, tmp_path / "log", *flags, f"--{axis}-model-parallel-size", "2", "--output-dir",
                  str(tmp_path / "two")) as run:  # fmt: skip
        assert run.wait() == 0, run.said
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-5)
    assert (tmp_path / "two" / "samples.txt").read_text() == (alone / "samples.txt").read_text()


class TestDocuments:
    """Packed documents: the switches change what the model sees, and nothing else breaks."""

    def test_masks_and_positions(self, tmp_path, flags):
        plain = tmp_path / "plain"
        assert train(plain, base=flags) == 0
        for switch in ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"):
            folder = tmp_path / switch.strip("-")
            assert train(folder, switch, base=flags) == 0
            assert losses(folder)[-1] < losses(folder)[0]
            assert losses(folder) != losses(plain), f"{switch} has no effect"

    def test_eod_mask_counts_fewer_tokens_in_the_loss_only(self, tmp_path, flags):
        assert train(tmp_path, "--eod-mask-loss", base=flags) == 0
        assert steps(tmp_path)[-1]["consumed_tokens"] == 8 * 8 * 32


def test_a_recipe_mocks_data_until_data_path_is_given(tmp_path, flags, data):
    recipe = tmp_path / "mock.yaml"
    recipe.write_text("data:\n  mock_data: true\nmodel:\n  vocab_size: 300\n")
    assert train(tmp_path / "files", "--recipe", os.fspath(recipe), base=flags) == 0
    assert train(tmp_path / "plain", base=flags) == 0
    assert losses(tmp_path / "files") == losses(tmp_path / "plain")
