"""What cannot work, as a user meets it: one clear message with a remedy, exit status 2, nothing lost or written."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from megazero.data.indexed import IndexedWriter
from tests.train.command import TINY, command, everything_under, plain, torchrun, train, train_argv, train_on_rank

FROM_FILES = (*TINY, "--split", "80,20")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty documents of 20 tokens below 64; the prefix of the pair."""
    return write_pair(
        tmp_path_factory.mktemp("corpus") / "tokens", [[(7 * i + j) % 64 for j in range(20)] for i in range(40)]
    )


def write_pair(prefix, documents):
    with IndexedWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens, np.uint16))
    return prefix


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command line that must be refused: its message, after a check that nothing was written."""

    def check(*flags, base, status=2):
        folder = tmp_path / "run"
        before = everything_under(tmp_path)
        capsys.readouterr()
        assert train(folder, *flags, base=base) == status
        said = capsys.readouterr()
        assert said.err.startswith("error: "), said.err
        assert "Traceback" not in said.err
        after = {name: data for name, data in everything_under(tmp_path).items() if "index-cache" not in name}
        assert after == before
        return said.err

    return check


def test_the_corpus_trains(tmp_path, corpus):
    assert train(tmp_path, "--data-path", str(corpus), base=FROM_FILES) == 0


MOCK = (*TINY, "--mock-data")


TP = "--tensor-model-parallel-size"
ODD_VOCAB = ("--make-vocab-size-divisible-by", "1", "--vocab-size", "63")
IMPOSSIBLE = {
    "world": ((TP, "2"), r"world size 1 does not fit tp·pp·cp = 2·1·1 = 2.*Start 2 ranks"),
    "heads": (
        ("--hidden-size", "30"),
        r"--hidden-size 30 is not divisible by --num-attention-heads 4.*Use --hidden-size 28 or 32",
    ),
    "groups": (
        ("--num-query-groups", "3"),
        r"--num-attention-heads 4 is not divisible by --num-query-groups 3.*Use --num-query-groups 2 or 4",
    ),
    "heads over tp": (
        ("--num-attention-heads", "2", TP, "4"),
        r"--num-attention-heads 2 is not divisible by --tensor-model-parallel-size 4.*Use --tensor-model-parallel-size",
    ),
    "vocab over tp": (
        (*ODD_VOCAB, TP, "2"),
        r"--vocab-size 63 padded to a multiple of 1 is 63.*Use --make-vocab-size-divisible-by 2",
    ),
    "batch": (
        ("--global-batch-size", "7"),
        r"--global-batch-size 7 is not divisible by .*= 2.*Use --global-batch-size 6 or 8",
    ),
    "flag": (("--num-layer", "2"), r"unknown flag --num-layer\. Did you mean '--num-layers'\?"),
    "load": (("--load", "{tmp}/nothing"), r"checkpoint folder \S+/nothing does not exist: give --load a folder"),
    "number": (("--lr", "fast"), r"--lr: expected a finite number, got 'fast'"),
}


class TestSettings:
    @pytest.mark.parametrize(("flags", "says"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
    def test_message(self, refused, tmp_path, flags, says):
        said = refused(*(flag.format(tmp=tmp_path) for flag in flags), base=MOCK)
        assert re.search(says, said, re.DOTALL), said

    def test_all_problems_at_once(self, refused):
        said = refused("--hidden-size", "30", "--global-batch-size", "7", "--min-lr", "1", base=MOCK)
        assert said.startswith("error: 3 problems in the configuration:")

    def test_the_global_batch_over_the_ranks(self, ranks, tmp_path):
        argv = command(tmp_path / "run", "--global-batch-size", "6")
        first, second = ranks.run(train_on_rank, 2, argv, group=False)
        assert first[0] == second[0] == 2
        assert "micro-batch-size · data-parallel size = 2 · 2 = 4" in first[1]
        assert "Use --global-batch-size 4 or 8" in first[1]
        assert second[1] == "", "one rank says it"
        assert not (tmp_path / "run").exists()

    def test_the_world_size_under_torchrun(self, tmp_path):
        argv = command(tmp_path / "run", "--tensor-model-parallel-size", "2")
        with torchrun(3, tmp_path / "log", *argv) as run:
            assert run.wait() == 1, "torchrun's own status"
        assert run.said.count("error: world size 3 does not fit tp·pp·cp = 2·1·1 = 2") == 1
        assert "Start 2 or 4 ranks" in run.said
        assert "exitcode  : 2" in run.said
        assert not (tmp_path / "run").exists()

    def test_the_launchers_variables(self, refused, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        assert "WORLD_SIZE is not set. Start with torchrun" in refused(base=MOCK)

    def test_more_ranks_than_devices(self, refused, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        place = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)  # the second machine of two: its first rank speaks for it
        assert "2 ranks on this machine, but it shows 1 GPU: one rank needs one" in refused(base=MOCK)

    @pytest.mark.parametrize(
        ("recipe", "says"),
        [
            ("model:\n\tnum_layers: 2\n", "bad.yaml line 2: a tab; YAML is indented with spaces"),
            ("model:\n  num_layer: 2\n", "bad.yaml: unknown key 'num_layer' in `model`. Did you mean 'num_layers'?"),
            ("modle:\n  num_layers: 2\n", "bad.yaml: unknown section 'modle'"),
            ("model:\n  num_layers: two\n", "bad.yaml: model.num_layers"),
            ("base: nowhere.yaml\n", "nowhere.yaml: no such file"),
        ],
        ids=["tab", "typo", "section", "number", "base"],
    )
    def test_recipe(self, refused, tmp_path, recipe, says):
        (tmp_path / "bad.yaml").write_text(recipe)
        assert says in refused("--recipe", str(tmp_path / "bad.yaml"), base=MOCK)

    def test_settings_are_refused_before_torch_is_imported(self, tmp_path):
        with plain(tmp_path / "log", "--num-layer", "2", environment={"PYTHONPROFILEIMPORTTIME": "1"}) as run:
            assert run.wait() == 2
        assert "unknown flag --num-layer" in run.said
        assert not re.search(r"\| +torch$", run.said, re.MULTILINE)


class TestData:
    def test_missing_file(self, refused, tmp_path):
        said = refused("--data-path", str(tmp_path / "nowhere"), base=FROM_FILES)
        assert f"data file {tmp_path}/nowhere.idx does not exist" in said

    def test_a_bin_that_is_cut_short(self, refused, tmp_path):
        prefix = write_pair(tmp_path / "tokens", [[1] * 40] * 9)
        whole = (tmp_path / "tokens.bin").read_bytes()
        (tmp_path / "tokens.bin").write_bytes(whole[:-6])
        said = refused("--data-path", str(prefix), base=FROM_FILES)
        assert "tokens.bin" in said
        assert "tools/preprocess_data.py" in said

    def test_an_idx_of_another_bin(self, refused, tmp_path):
        prefix = write_pair(tmp_path / "tokens", [[1] * 40] * 9)
        write_pair(tmp_path / "other", [[1] * 30] * 9)
        (tmp_path / "other.idx").rename(tmp_path / "tokens.idx")
        assert "tools/preprocess_data.py" in refused("--data-path", str(prefix), base=FROM_FILES)

    def test_an_idx_that_is_cut_short(self, refused, tmp_path):
        prefix = write_pair(tmp_path / "tokens", [[1] * 40] * 9)
        whole = (tmp_path / "tokens.idx").read_bytes()
        (tmp_path / "tokens.idx").write_bytes(whole[:60])
        assert "tokens.idx" in refused("--data-path", str(prefix), base=FROM_FILES)

    def test_token_ids_outside_the_vocabulary(self, refused, tmp_path):
        prefix = write_pair(tmp_path / "tokens", [[1, 2, 64] * 20] * 9)
        said = refused("--data-path", str(prefix), base=FROM_FILES)
        assert "has token id 64" in said
        assert "outside the vocabulary of 64 ids (0 to 63)" in said

    @pytest.mark.parametrize("documents", [[], [[]]], ids=["no document", "an empty document"])
    def test_empty_corpus(self, refused, tmp_path, documents):
        prefix = write_pair(tmp_path / "tokens", documents)
        assert "tokens.bin is empty: there are no tokens to train on" in refused(
            "--data-path", str(prefix), base=FROM_FILES
        )

    def test_sequence_longer_than_the_corpus(self, refused, corpus):
        said = refused("--data-path", str(corpus), "--seq-length", "1000", base=FROM_FILES)
        assert "the train part of" in said
        assert "one sample needs seq-length + 1 = 1001" in said
        assert "Lower --seq-length" in said

    def test_a_split_that_leaves_no_validation(self, refused, corpus):
        said = refused("--data-path", str(corpus), "--split", "100,0", base=FROM_FILES)
        assert "the validation part of" in said

    def test_every_rank_stops_when_data_is_bad(self, ranks, tmp_path):
        argv = command(tmp_path / "run", "--data-path", str(tmp_path / "nowhere"), base=FROM_FILES)
        for status, said in ranks.run(train_on_rank, 2, argv, group=False):
            assert status == 2
            assert "nowhere.idx does not exist" in said


class TestOutput:
    """As root every folder is writable: what cannot be written is a path below a file."""

    @pytest.fixture
    def blocked(self, tmp_path):
        (tmp_path / "file").write_text("kept")
        return tmp_path / "file" / "run"

    def test_output_dir(self, tmp_path, blocked, capsys):
        assert train(blocked) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert str(blocked) in said
        assert "Not a directory. Give another with --save or --output-dir" in said
        assert everything_under(tmp_path) == {"file": b"kept"}

    def test_output_dir_on_two_ranks(self, ranks, tmp_path, blocked):
        results = ranks.run(train_on_rank, 2, command(blocked), group=False)
        assert [status for status, _ in results] == [2, 2]
        assert "Not a directory" in results[0][1]
        assert everything_under(tmp_path) == {"file": b"kept"}

    def test_only_the_output_dir_on_two_ranks(self, ranks, tmp_path, blocked):
        """The checkpoints' folder is fine, so that rank 0 alone meets the problem, when it opens metrics.jsonl."""
        results = ranks.run(train_on_rank, 2, command(blocked, "--save", str(tmp_path / "saved")), group=False)
        assert [status for status, _ in results] == [2, 2]
        assert f"{blocked}/metrics.jsonl cannot be written (Not a directory)" in results[0][1]
        assert "Give a writable folder with --output-dir" in results[0][1]
        assert "stopped answering" not in results[1][1]

    def test_config_yaml(self, tmp_path, capsys):
        (tmp_path / "config.yaml").mkdir()
        assert train(tmp_path) == 2
        assert f"--output-dir {tmp_path} cannot be written (Is a directory). Give" in capsys.readouterr().err

    def test_save_is_tried_before_training(self, tmp_path, blocked, capsys):
        assert train(tmp_path / "run", "--save", str(blocked)) == 2
        said = capsys.readouterr()
        assert str(blocked) in said.err
        assert "lm loss" not in said.out


class TestCheckpoints:
    @pytest.fixture
    def saved(self, tmp_path):
        assert train(tmp_path / "run", "--save-interval", "3") == 0
        return tmp_path / "run"

    def refuse(self, saved, capsys, *flags):
        before = everything_under(saved)
        capsys.readouterr()
        assert train(saved, "--train-iters", "8", "--lr-decay-iters", "6", *flags) == 2
        assert everything_under(saved) == before
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        return said

    def test_of_another_model(self, saved, capsys):
        said = self.refuse(saved, capsys, "--num-layers", "3", "--ffn-hidden-size", "128")
        assert "step_00000006 is a checkpoint of another model:" in said
        assert "[64, 32] in the checkpoint, [128, 32] in the model" in said
        assert "Use the model settings in" in said

    @pytest.mark.parametrize("section", ["weights", "optimizer"])
    def test_a_flipped_byte(self, saved, capsys, section):
        victim = next((saved / "checkpoints" / "step_00000006" / section).glob("*.safetensors"))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        said = self.refuse(saved, capsys)
        assert f"{victim} is damaged: its sha256" in said
        assert "Usable steps here: 3; choose one with --ckpt-step" in said
        assert train(saved, "--ckpt-step", "3") == 0, "what the message advises works"

    @pytest.mark.parametrize(
        "name", ["weights/*.safetensors", "weights/tensors.json", "MANIFEST.json", "state.json", "../latest"]
    )
    def test_a_file_that_is_cut_short(self, saved, capsys, name):
        victim = next((saved / "checkpoints" / "step_00000006").glob(name))
        victim.write_bytes(victim.read_bytes()[:-8])
        said = self.refuse(saved, capsys)
        assert str(victim.resolve()) in said.replace("/step_00000006/..", "")
        assert re.search(r"Usable steps here: 3(, 6)?; choose one with --ckpt-step", said)

    def test_a_missing_file(self, saved, capsys):
        next((saved / "checkpoints" / "step_00000006" / "optimizer").glob("*.safetensors")).unlink()
        assert "is missing, though MANIFEST.json lists it" in self.refuse(saved, capsys)

    def test_load_of_an_empty_folder(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert train(tmp_path / "run", "--load", str(tmp_path / "empty")) == 2
        assert f"checkpoint folder {tmp_path}/empty holds no checkpoint" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_load_of_a_step_that_is_not_there(self, saved, tmp_path, capsys):
        argv = ("--load", str(saved / "checkpoints"), "--ckpt-step", "5")
        assert train(tmp_path / "new", *argv) == 2
        assert "holds no whole checkpoint of iteration 5. Usable steps here: 3, 6" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_damage_stops_all_ranks(self, ranks, saved):
        victim = next((saved / "checkpoints" / "step_00000006" / "weights").glob("*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-8])
        results = ranks.run(train_on_rank, 2, command(saved, "--train-iters", "8"), group=False)
        assert [status for status, _ in results] == [2, 2]
        assert "is cut short" in results[0][1]

    def test_a_damaged_metrics_file(self, saved, capsys):
        path = saved / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
        said = self.refuse(saved, capsys)
        assert f"{path}, line 2, is not a metrics record" in said


def test_help_and_print_config_end_with_status_0(capsys):
    assert train_argv(["--help"]) == 0
    assert "--tensor-model-parallel-size" in capsys.readouterr().out
    assert train_argv([*MOCK, "--print-config"]) == 0
    assert "num_layers: 2  # flag --num-layers" in capsys.readouterr().out
