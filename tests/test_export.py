"""What an artifact says of the model that it holds, and the way back to that model."""

import dataclasses
import json

import pytest
import torch

from pgolf_fast import recipe
from pgolf_fast.artifact import pack, unpack
from pgolf_fast.errors import UserError
from pgolf_fast.export import load_model, metadata, quantize_run, read_run
from pgolf_fast.model import GPT
from pgolf_fast.quantize import PUBLISHED, dequantize, quantize
from pgolf_fast.shards import shard_name
from tests.finished_run import write_run

SMALL = (
    "model.model_dim=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.num_layers=4",
    "model.vocab_size=96",
    "model.mlp_mult=2",
    "train.data=/home/someone/data",
)
SMALLER = {
    "legal-ttt-691": ("model.ve_layers=2,3", "model.bigram_buckets=64"),
    "gepa-598": ("model.ve_layers=2,3", "model.bigram_buckets=64"),
    "caseops-1934": ("model.loop_start=1", "model.loop_end=1", "model.parallel_start=3"),
}


def resolve(name):
    return recipe.resolve(name, (*SMALL, *SMALLER[name]), {})


def trained(settings) -> GPT:
    """A model in which no tensor is zero, so that every one matters."""
    model = GPT(settings.model, seed=1, stream_dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def write(path, name, **other) -> tuple[GPT, recipe.Recipe]:
    """An artifact of a small model, and that model with the quantized weights."""
    settings = resolve(name).recipe
    model = trained(settings)
    tensors, _ = quantize(model.published_tensors(), PUBLISHED[name], plain_rounding=True)
    path.write_bytes(pack(tensors, metadata={**metadata(name, settings), **other}))
    model.load_published(dequantize(tensors))
    return model, settings


@pytest.mark.parametrize("name", SMALLER)
def test_the_loaded_model_is_the_quantized_one(tmp_path, name):
    model, settings = write(tmp_path / "a", name)
    loaded_settings, loaded = load_model(tmp_path / "a", expect=settings)
    assert loaded_settings.model == settings.model and loaded_settings.optim == settings.optim
    for (key, p), q in zip(model.named_parameters(), loaded.parameters()):
        assert p.dtype == q.dtype and torch.equal(p, q), key
    tokens = torch.randint(0, 96, (2, 33))
    assert torch.equal(model(tokens[:, :-1], tokens[:, 1:], reduction="none"), loaded(tokens[:, :-1], tokens[:, 1:], reduction="none"))


def test_no_path_of_the_training_machine_goes_along(tmp_path):
    write(tmp_path / "a", "legal-ttt-691")
    described = unpack((tmp_path / "a").read_bytes()).metadata
    assert described["recipe"] == "legal-ttt-691" and described["settings"]["model.model_dim"] == 64
    assert "/home/someone" not in repr(described)


def test_a_run_that_went_on_is_read_as_it_ended_last(tmp_path):
    write_run(tmp_path, "legal-ttt-691")
    with (tmp_path / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "end", "weights": "average", "ledger_s": {"train": 601.5}}) + "\n")
    run = read_run(tmp_path)
    assert (run.weights, run.train_s) == ("average", 601.5)


def test_plain_rounding_reads_no_text(tmp_path):
    write_run(tmp_path, "caseops-1934")
    (tmp_path / shard_name("train", 0)).unlink()
    run = read_run(tmp_path)
    assert quantize_run(run, "cpu", plain_rounding=True).tensors.keys() == run.state.keys()
    with pytest.raises(UserError, match="no fineweb_train_000000.bin"):
        quantize_run(run, "cpu")


def test_another_recipe_is_refused(tmp_path):
    write(tmp_path / "a", "legal-ttt-691")
    with pytest.raises(UserError, match=r"of recipe legal-ttt-691, whose model\.activation is relu2, not leaky_relu2"):
        load_model(tmp_path / "a", expect=resolve("caseops-1934").recipe)


def test_files_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="artifact: cannot read"):
        load_model(tmp_path / "none")
    described = metadata("legal-ttt-691", resolve("legal-ttt-691").recipe)
    for part in ({}, {"recipe": described["recipe"]}, {"settings": described["settings"]}, {"recipe": 691, "settings": {}}):
        (tmp_path / "a").write_bytes(pack({"x": torch.ones(3)}, metadata=part))
        with pytest.raises(UserError, match="does not say which recipe its weights are of"):
            load_model(tmp_path / "a")


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("model.num_layers", 10**9, "more than 1024 layers or loops"),
        ("model.num_loops", "many", "more than 1024 layers or loops"),
        ("model.model_dim", 2**40, "a model of its recipe has"),
        ("model.num_layers", 5, "a model of its recipe has"),
        ("model.widht", 64, "no setting 'model.widht'"),
        ("model.activation", "gelu", "expected one of relu2"),
        ("model", 64, "no setting 'model'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_allocated(tmp_path, key, value, message):
    settings = resolve("legal-ttt-691").recipe
    described = metadata("legal-ttt-691", settings)
    described["settings"][key] = value
    (tmp_path / "a").write_bytes(pack({"x": torch.ones(3)}, metadata=described))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a")


def test_settings_go_through_json_unchanged():
    settings = resolve("caseops-1934").recipe
    again = recipe.from_values(recipe.values(settings), "here")
    assert all(getattr(again, f.name) == getattr(settings, f.name) for f in dataclasses.fields(settings))
