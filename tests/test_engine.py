"""`compress_blockwise`: what a block is given, from disk to disk, killed runs, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import linearize
from linearize import CheckpointError, DataError, UsageError
from linearize.blockwise.chain import BlockOutput, chain_of
from linearize.blockwise.states import reference_batches
from linearize.blockwise.told import NotAChain
from linearize.blockwise.verb import compress_blockwise
from linearize.cli import run
from linearize.cli.blockwise import batches_of_tensors
from linearize.cost import cost
from linearize.running.batches import ReadData
from linearize.storage.shards import INDEX
from tests.chains import STAGES, Block, Net, net, points

transformers = pytest.importorskip("transformers")

WORDS, LAYERS, WIDE = 50, 2, 96


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    told = {"hidden_size": 32, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    told |= {"num_key_value_heads": 2, "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**told)).eval().to(dtype)


def tokens(batches: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (4, 16), generator=generator) for _ in range(batches)]


class Disk(NamedTuple):
    total: int
    used: int
    free: int


class Case(NamedTuple):
    """A model in a folder, and what became of it."""

    folder: Path
    result: linearize.BlockwiseResult
    left: list[Path]


def shrunk(source: Any, out: Path, **options: Any) -> linearize.BlockwiseResult:
    told = {"params": 0.8, "progress": False, "data": tokens(), **options}
    return compress_blockwise(source, told.pop("data"), out, **told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several shards."""
    made = tmp_path_factory.mktemp("model") / "llama"
    llama().save_pretrained(made, max_shard_size="20KB")
    assert len(list(made.glob("model-*.safetensors"))) > 4
    (made / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    place = tmp_path_factory.mktemp("file")
    result = shrunk(folder, place / "small.safetensors")
    return Case(folder, result, list(place.iterdir()))


class TestFromDiskToDisk:
    def test_a_file(self, file: Case) -> None:
        report, whole = file.result.report, llama()
        small: Any = linearize.load(file.result.path)
        count = sum(p.numel() for p in small.parameters())
        assert report.met
        assert count / whole.num_parameters() == pytest.approx(report.reached)
        assert report.engine == "blockwise"
        assert len(report.blocks) == LAYERS
        assert "local" in report.sensitivity
        assert type(small) is type(whole)
        assert not any(p.is_meta for p in small.parameters())
        assert file.left == [file.result.path]  # nothing of the work
        assert [site.site for site in file.result.plan.sites] == [f"model.layers.{i}.mlp.act_fn" for i in range(LAYERS)]
        assert small.generate(tokens()[0][:1], max_new_tokens=3, do_sample=False).shape == (1, 19)
        assert "model.layers.1" in str(report)
        assert json.dumps(report.to_dict())

    def test_the_drift_told_is_the_one_there_is(self, file: Case) -> None:
        """The hidden states of the whole models, taken by hooks, differ by what the report says."""
        data = [tokens()[index] for index in reference_batches(6)]
        ours, theirs = (hidden(model, data) for model in (linearize.load(file.result.path), llama()))
        for note, one, other in zip(file.result.report.blocks, ours, theirs, strict=True):
            off = float((one - other).double().square().sum() / other.double().square().sum())
            # States agree to some 1e-6, and differ by about 1e-2.
            assert note.drift == pytest.approx(off, rel=1e-2)
            assert off > 1e-6

    def test_blocks_are_given_what_the_whole_model_gives_them(self, file: Case, tmp_path: Path) -> None:
        """A block alone, in memory, on what hooks saw of the whole model, the blocks before it replaced."""
        whole: Any = llama()
        small: Any = linearize.load(file.result.path)
        whole.model.layers[0] = small.model.layers[0]
        given = arguments_of(whole, 1)
        alone = linearize.compress(
            whole.model.layers[1], given, params=share(small, 1), families=["channels"], search=0, rounds=0,
            cache=False, progress=False,
        )  # fmt: skip
        note, block = file.result.report.blocks[1], whole.model.layers[1]
        with torch.no_grad():
            original, ours, theirs = (
                torch.cat([m(**x) for x in given]) for m in (block, small.model.layers[1], alone.model)
            )
        assert note.error == pytest.approx(distance(ours, original) ** 2, rel=0.5)  # of four batches, and of all
        # The whole engine weighs outputs by gradients: of the two, ours is best where all count alike.
        assert 0 < distance(ours, original) <= 1.05 * distance(theirs, original)

    def test_a_folder_for_transformers(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "small").mkdir()
        for name in ("model-00001-of-00009.safetensors", "tokenizer.json"):  # of a run that was killed as it wrote
            (tmp_path / "small" / name).write_text("half")
        result = shrunk(folder, tmp_path / "small")
        small = transformers.LlamaForCausalLM.from_pretrained(result.path)
        widths = {layer.mlp.down_proj.in_features for layer in small.model.layers}
        assert widths == {small.config.intermediate_size}
        assert widths < set(range(WIDE))
        assert (result.path / "tokenizer.json").read_text() == "{}"
        assert (result.path / "generation_config.json").is_file()
        assert sum(p.numel() for p in small.parameters()) == result.report.parameters[1]
        states = hidden(small, tokens())[-1], hidden(llama(), tokens())[-1]
        assert result.report.drift == pytest.approx(distance(*states) ** 2, rel=0.5)  # of four batches, and of all
        with pytest.raises(UsageError, match="exists already"):
            shrunk(folder, tmp_path / "small")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("")
        with pytest.raises(UsageError, match="exists already"):
            shrunk(folder, tmp_path / "mine")

    def test_bfloat16_stays(self, tmp_path: Path, file: Case) -> None:
        llama(torch.bfloat16).save_pretrained(tmp_path / "model")
        result = shrunk(tmp_path / "model", tmp_path / "small.safetensors")
        small = linearize.load(result.path)
        assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
        # A state is rounded a few times in each block, by 2^-9 relative: 10 such roundings in square.
        rounding = 10 * 2.0**-18
        for ours, best in zip(result.report.blocks, file.result.report.blocks, strict=True):
            assert ours.error <= 2 * (best.error + rounding)

    @pytest.mark.slow
    def test_float16_tied_words_and_padding(self, tmp_path: Path) -> None:
        llama(torch.float16, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
        made: list[Any] = []
        for name, noise in (("a", 0), ("b", 5)):
            data = []
            for batch, other in zip(tokens(), tokens(7)[1:], strict=True):
                mask = torch.cat([torch.ones_like(batch), torch.zeros_like(batch[:, :noise])], 1)
                data.append({"input_ids": torch.cat([batch, other[:, :noise]], 1), "attention_mask": mask})
            out = tmp_path / f"{name}.safetensors"
            made.append(linearize.load(shrunk(tmp_path / "model", out, data=data, stock=True).path))
        for small in made:
            assert {p.dtype for p in small.parameters()} == {torch.float16}
            assert small.lm_head.weight is small.model.embed_tokens.weight
        original = hidden(llama(torch.float16, tie_word_embeddings=True), tokens())[-1]
        one, other = (hidden(small, tokens())[-1] for small in made)
        assert distance(one, other) < 0.1 * distance(one, original)  # padding counted for nothing


def hidden(model: Any, data: list[Tensor]) -> list[Tensor]:
    """The states behind each layer."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.register_forward_hook(lambda _m, _i, output, into=into: into.append(output))
        for layer, into in zip(model.model.layers, found, strict=True)
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(some) for some in found]


def arguments_of(model: Any, position: int) -> list[dict[str, Any]]:
    """What a layer of a Llama is told, as hooks see it."""
    found: list[dict[str, Any]] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = {**kwargs, "hidden_states": args[0]}
        found.append({name: told[name] for name in ("hidden_states", "attention_mask", "position_embeddings")})

    handle = model.model.layers[position].register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for batch in tokens():
            model(batch, use_cache=False)
    handle.remove()
    return found


def share(small: Any, position: int) -> float:
    before, after = (sum(p.numel() for p in m.model.layers[position].parameters()) for m in (llama(), small))
    return float(after / before)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().double().norm() / other.detach().double().norm())


class TestCommand:
    def test_from_disk_to_disk(self, file: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        save_file({"input_ids": torch.cat(tokens())}, tmp_path / "tokens.safetensors")
        arguments = ["compress", f"hf:{file.folder}", "--data", str(tmp_path / "tokens.safetensors"), "--batch", "4"]
        assert run([*arguments, "--params", "0.8", "--engine", "blockwise", "--out", str(out)]) == 0
        assert "model.layers.1" in capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == ["compressed.safetensors", "plan.json", "report.json"]
        ours, theirs = linearize.load(out / "compressed.safetensors"), linearize.load(file.result.path)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert distance(a, b) < 1e-4, name  # the same sums
        assert linearize.Plan.from_json((out / "plan.json").read_text()) == file.result.plan

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--speedup", "2"], "--speedup"),
            (["--params", "0.8", "--family", "heads"], "--family"),
            (["--params", "0.8", "--engine", "other"], "--engine"),
            ([], "budgets"),
        ],
    )
    def test_what_it_does_not_have(
        self, options: list[str], told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_file({"input_ids": torch.cat(tokens())}, tmp_path / "tokens.safetensors")
        more = ["--data", str(tmp_path / "tokens.safetensors"), "--out", str(tmp_path / "out"), "--engine", "blockwise"]
        assert run(["compress", f"hf:{folder}", *more, *options]) == 2
        assert told in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*"))

    def test_batches_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "some.safetensors"
        save_file({"a": torch.arange(5), "b": torch.ones(5, 2)}, path)
        found = batches_of_tensors(path, 2)
        assert [len(batch["a"]) for batch in found] == [2, 2, 1]
        assert found[1]["a"].tolist() == [2, 3]
        save_file({"a": torch.arange(5), "b": torch.ones(4, 2)}, path)
        with pytest.raises(DataError, match="lengths"):
            batches_of_tensors(path, 2)


class TestInMemory:
    def test_a_model_stays_as_it_was(self, tmp_path: Path) -> None:
        model = net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        keys = {name: list(vars(module)) for name, module in model.named_modules()}
        result = shrunk(model, tmp_path / "small.safetensors", data=points(), params=None, flops=0.7)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert keys == {name: list(vars(module)) for name, module in model.named_modules()}
        small = linearize.load(result.path, model=net())
        assert result.report.engine == "blockwise"
        assert result.report.met
        assert cost(small, points()[0]).flops / cost(model, points()[0]).flops == pytest.approx(result.report.reached)
        with torch.no_grad():
            assert 0 < distance(small(points()[0]), model(points()[0])) < 0.5

    def test_a_block_without_activations_stays(self, tmp_path: Path) -> None:
        model = net()
        model.blocks[1].act = nn.Identity()
        report = shrunk(model, tmp_path / "small.safetensors", data=points(), params=0.7).report
        assert report.blocks[1].before == report.blocks[1].after
        assert report.met
        assert any("no activation" in note for note in report.notes)


class TestKilled:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
    def test_nothing_is_lost_but_the_block_at_work(self, tmp_path: Path) -> None:
        """Killed by SIGKILL at every stage, and continued: the very bytes of a run that was left alone."""
        root = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.chains", str(tmp_path)]
        told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        done = {"first states": 0, "block saved": 1, "states half": 1, "note": 1, "written": 2}
        found = json.loads(told.stdout.splitlines()[-1])
        assert list(found) == STAGES
        for stage, (killed, _, status, lines, same, left) in found.items():
            assert (killed, status, same) == (-9, 0, True), stage
            assert len(left) == 1, stage  # nothing of the work
            again = [line for line in lines if line.startswith("blocks.")]
            assert len(again) == 2 - done[stage], (stage, lines)

    def test_work_of_another_request_is_not_taken(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        place, out = tmp_path / "work", tmp_path / "small.safetensors"

        class Stop(Exception):
            pass

        def stop(line: str) -> None:
            if line.startswith("blocks.1"):
                raise Stop

        with pytest.raises(Stop):
            shrunk(net(), out, data=points(), params=0.7, checkpoint_dir=place, progress=stop)
        assert sorted(p.name for p in place.glob("note-*")) == ["note-00000.json", "note-00001.json"]
        path = place / "block-00000.safetensors"
        held = path.read_bytes()
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        shrunk(net(), out, data=points(), params=0.7, checkpoint_dir=place)
        assert "is damaged" in caplog.text
        assert not place.exists()
        assert out.exists()
        with pytest.raises(Stop):
            shrunk(net(), out, data=points(), params=0.7, checkpoint_dir=place, progress=stop)
        shrunk(net(), out, data=points(), params=0.75, checkpoint_dir=place)
        assert "of another model, data or request" in caplog.text


class TestBadInput:
    def test_shards(self, folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        first = sorted(broken.glob("model-*.safetensors"))[1]
        first.rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match=f"{first.name}: it is missing"):
            shrunk(broken, tmp_path / "out")
        shutil.copy(sorted(folder.glob("model-*.safetensors"))[2], first)
        with pytest.raises(CheckpointError, match=f"is not in it, and {INDEX} says that it is"):
            shrunk(broken, tmp_path / "out")
        first.write_bytes(b"12345")
        with pytest.raises(CheckpointError, match="truncated"):
            shrunk(broken, tmp_path / "out")
        llama(hidden_size=64).save_pretrained(tmp_path / "other")
        shutil.copy(folder / "config.json", tmp_path / "other" / "config.json")
        with pytest.raises(CheckpointError, match=r"is \(50, 64\), and that of the model of config.json is \(50, 32\)"):
            shrunk(tmp_path / "other", tmp_path / "out")
        config = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        (tmp_path / "other" / "config.json").write_text(config)
        llama().save_pretrained(tmp_path / "weights")
        shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"there is no tensor 'model.layers.2"):
            shrunk(tmp_path / "other", tmp_path / "out")
        with pytest.raises(UsageError, match="is no folder"):
            shrunk(tmp_path / "nowhere", tmp_path / "out")
        with pytest.raises(UsageError, match=r"no config.json"):
            shrunk(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, size = net(), sum(p.nbytes for p in net().parameters())
        free = 2 * size + 2 * 3 * 32 * 8 * 4  # the results, and the states of three batches, before and behind a block
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, free))
        with pytest.raises(UsageError, match=r"hidden states of 5 batches.*Pass at most 1 of these batches"):
            shrunk(model, tmp_path / "small.safetensors", data=points(), params=0.7)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, 10))
        with pytest.raises(UsageError, match="Free some space, or"):
            shrunk(model, tmp_path / "small.safetensors", data=points(), params=0.7)

    def test_arguments(self, tmp_path: Path) -> None:
        for options, match in [
            ({"params": None}, "found 0 budgets"),
            ({"flops": 0.5}, "found 2 budgets"),
            ({"params": 1.5}, "params"),
            ({"params": 0.01}, "is outside the blocks"),
            ({"round_to": 0}, "round_to"),
            ({"out": tmp_path / "small", "stock": False}, "needs stock layers"),
        ]:
            out = options.pop("out", tmp_path / "small.safetensors")  # type: ignore[attr-defined]
            with pytest.raises(UsageError, match=match):
                shrunk(net(), out, data=points(), **options)  # type: ignore[arg-type]
        with pytest.raises(DataError):
            shrunk(net(), tmp_path / "small.safetensors", data=(x for x in points()))

    def test_data_that_are_not_finite(self, tmp_path: Path) -> None:
        data = points()
        data[2][0] = torch.nan
        with pytest.raises(DataError, match="NaN"):
            shrunk(net(), tmp_path / "small.safetensors", data=data, params=0.7)


def reason(model: nn.Module, example: Any = None) -> str:
    """Why a model is no chain."""
    batch = next(iter(ReadData(model, [points()[0] if example is None else example])))
    with pytest.raises(NotAChain) as caught:
        chain_of(model, batch, model.get_submodule, lambda _: model)
    return str(caught.value)


class Pair(Block):
    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        return super().forward(x, scale=scale), x


class Listed(Block):
    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        return [super().forward(x, scale=scale), None]


class Unlike(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scale=x.mean())
        return x


class TestChains:
    def test_what_is_found(self) -> None:
        model = net()
        batch = next(iter(ReadData(model, points())))
        chain, _ = chain_of(model, batch, model.get_submodule, lambda _: model)
        assert chain.blocks == ("blocks.0", "blocks.1", "blocks.2")
        assert chain.hidden == "x"
        assert chain.form == BlockOutput()
        assert all("forward" not in vars(module) for module in model.modules())

    def test_outputs_with_one_state_in_them(self) -> None:
        class First(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = self.embed(x)
                for block in self.blocks:
                    x = block(x, scale=torch.ones(()))[0]
                return x

        model = First()
        model.blocks = nn.ModuleList(Listed() for _ in range(2))
        batch = next(iter(ReadData(model, points())))
        chain, _ = chain_of(model, batch, model.get_submodule, lambda _: model)
        assert chain.form == BlockOutput(0, 2, list)

    def test_what_is_none(self) -> None:
        assert "blocks.1: is not given what blocks.0 gave" in reason(net(between=lambda x, _: x + 1))
        assert "blocks.2: is not given what blocks.1 gave" in reason(
            net(between=lambda x, all_of: x + all_of[-2] * (len(all_of) > 2))
        )
        assert "blocks.1: is told 'scale', which depends on what blocks before it gave" in reason(Unlike())
        pairs = net()
        pairs.blocks = nn.ModuleList(Pair() for _ in range(3))
        assert "gives back 2 things" in reason(pairs)
        twice = net()
        twice.blocks[2] = twice.blocks[1]
        assert "shares the weight" in reason(twice)
        tied: Any = net()
        tied.blocks[1].up.weight = tied.blocks[0].up.weight
        assert "shares the weight" in reason(tied)
        assert "no list of modules" in reason(Block(4), {"x": points()[0], "scale": torch.ones(())})
        wider = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        assert "does not keep its shape" in reason(wider)

    def test_other_models_are_compressed_as_a_whole(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = net(between=lambda x, _: x + 1)
        result = shrunk(model, tmp_path / "small.safetensors", data=points(), params=0.7)
        assert result.report.engine == "whole"
        assert "is not given what" in result.report.reason
        assert result.report.met
        assert "as a whole" in caplog.text
        small = linearize.load(result.path, model=model)
        assert sum(p.numel() for p in small.parameters()) == result.report.parameters[1]
        assert not (tmp_path / "small.safetensors.unfinished").exists()

    def test_a_block_that_turns_out_to_be_none(self, tmp_path: Path) -> None:
        """Stand-ins keep shapes; the third block does not."""

        def block(outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, outputs))

        model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(block(8), block(8), block(3)))
        result = shrunk(model, tmp_path / "small.safetensors", data=points(), params=0.7)
        assert result.report.engine == "whole"
        assert "makes (32, 3) of (32, 8)" in result.report.reason
