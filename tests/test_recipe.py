"""Merging of recipes: which source wins, and what a mistake is told."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_fast import recipe
from pgolf_fast.errors import UserError


def resolve(name, *overrides, **environ):
    return recipe.resolve(name, overrides, environ)


def write(folder, text, name="mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_order_of_the_sources(tmp_path):
    """One setting is given in all five places; taking the last away leaves the one before it."""
    write(tmp_path, "[optim]\nmatrix_lr = 2.0\nmuon_wd = 2.0\nadam_wd = 2.0\nbeta1 = 0.2", "below.toml")
    path = write(tmp_path, 'base = "below.toml"\n[optim]\nmatrix_lr = 3.0\nmuon_wd = 3.0\nadam_wd = 3.0')
    resolved = resolve(path, "optim.matrix_lr=5", MATRIX_LR="4", MUON_WD="4")
    optim = resolved.recipe.optim
    assert (optim.matrix_lr, optim.muon_wd, optim.adam_wd, optim.beta1, optim.beta2) == (5.0, 4.0, 3.0, 0.2, 0.95)
    sources = [resolved.sources[f"optim.{key}"] for key in ("matrix_lr", "muon_wd", "adam_wd", "beta1", "beta2")]
    assert sources == ["command line", "environment MUON_WD", "mine", "below", "default"]


def test_the_last_override_wins():
    assert resolve("base", "train.seed=1", "train.seed=2").recipe.train.seed == 2


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_resolves_and_says_what_it_is(name):
    assert len(resolve(name).note) > 20


def test_every_setting_has_a_meaning_and_a_default():
    for key, setting in recipe.SETTINGS.items():
        assert setting.meaning, key
        assert setting.default is not dataclasses.MISSING, key


def test_no_environment_name_is_claimed_twice():
    names = [name for setting in recipe.SETTINGS.values() for name in setting.env]
    assert len(names) == len(set(names))
    assert not {*recipe.FIXED_ENVIRONMENT, *recipe.IDLE_ENVIRONMENT} & set(names)


# Hyper-parameters of the published runs, section 8 of the sp1024 and section 10 of the CaseOps specification, by their own names.
SP1024_RUNS = {
    "SEED": (1337, 42, 1337),
    "ITERATIONS": (20000, 7000, 20000),
    "MAX_WALLCLOCK_SECONDS": (600, 0, 600),
    "WARMDOWN_ITERS": (3000, 3500, 3500),
    "WARMUP_STEPS": (20, 20, 20),
    "TRAIN_BATCH_TOKENS": (786432, 786432, 786432),
    "TRAIN_SEQ_LEN": (2048, 2048, 2048),
    "VAL_BATCH_SIZE": (524288, 524288, 524288),
    "VAL_LOSS_EVERY": (4000, 500, 4000),
    "TRAIN_LOG_EVERY": (500, 200, 500),
    "NUM_LAYERS": (11, 11, 11),
    "MODEL_DIM": (512, 512, 512),
    "NUM_HEADS": (8, 8, 8),
    "NUM_KV_HEADS": (4, 4, 4),
    "MLP_MULT": (3.0, 3.0, 3.0),
    "VOCAB_SIZE": (1024, 1024, 1024),
    "ROPE_BASE": (10000, 10000, 10000),
    "ROPE_DIMS": (16, 16, 16),
    "ROPE_TRAIN_SEQ_LEN": (1024, 1024, 1024),
    "LN_SCALE": (True, True, True),
    "XSA_LAST_N": (4, 4, 4),
    "BIGRAM_VOCAB_SIZE": (2048, 2048, 2048),
    "BIGRAM_DIM": (128, 128, 128),
    "VE_ENABLED": (True, True, True),
    "VE_DIM": (128, 128, 128),
    "VE_LAYERS": ((9, 10), (9, 10), (9, 10)),
    "QK_GAIN_INIT": (1.5, 1.5, 1.5),
    "LOGIT_SOFTCAP": (30, 30, 30),
    "TIED_EMBED_LR": (0.035, 0.035, 0.035),
    "MATRIX_LR": (0.025, 0.025, 0.025),
    "SCALAR_LR": (0.025, 0.025, 0.025),
    "DECODER_LR_MULT": (1.0, 2.0, 1.0),
    "TIED_EMBED_INIT_STD": (0.005, 0.005, 0.005),
    "MUON_MOMENTUM": (0.99, 0.99, 0.99),
    "MUON_MOMENTUM_WARMUP_START": (0.92, 0.92, 0.92),
    "MUON_MOMENTUM_WARMUP_STEPS": (1500, 1500, 1500),
    "MUON_BACKEND_STEPS": (5, 5, 5),
    "MUON_WD": (0.04, 0.04, 0.04),
    "ADAM_WD": (0.04, 0.04, 0.04),
    "BETA1": (0.9, 0.9, 0.9),
    "BETA2": (0.95, 0.95, 0.95),
    "ADAM_EPS": (1e-8, 1e-8, 1e-8),
    "GRAD_CLIP_NORM": (0.3, 0.3, 0.3),
    "EMA_ENABLED": (False, True, True),
    "SWA_ENABLED": (True, False, False),
    "SWA_EVERY": (50, 50, 50),
    "LATE_QAT_THRESHOLD": (0.1, 0.15, 0.15),
    "EVAL_SEQ_LEN": (2048, 2048, 2048),
    "EVAL_STRIDE": (64, 64, 64),
    "TTT_CHUNK_TOKENS": (32768, 32768, 32768),  # #379 has no TTT of its own
    "TTT_BATCH_SEQS": (32, 32, 32),
    "TTT_EPOCHS": (3, 10, 3),
    "TTT_LR": (0.002, 0.002, 0.002),
    "TTT_MOMENTUM": (0.9, 0.9, 0.9),
    "TTT_GRAD_CLIP": (1.0, 1.0, 1.0),
    "TTT_FREEZE_BLOCKS": (0, 2, 0),
    "SDTTT_ENABLED": (False, False, False),
    "SDTTT_EPOCHS": (2, 2, 2),
    "SDTTT_LR": (0.001, 0.001, 0.001),
    "SDTTT_TEMPERATURE": (2.0, 2.0, 2.0),
    "SDTTT_FREEZE_BLOCKS": (4, 4, 4),
}
CASEOPS_RUN = {
    "MATRIX_BITS": 6,
    "EMBED_BITS": 7,
    "ATTN_CLIP_SIGMAS": 12.0,
    "MLP_CLIP_SIGMAS": 12.0,
    "EMBED_CLIP_SIGMAS": 12.0,
    "GPTQ_CALIBRATION_BATCHES": 16,
    "VOCAB_SIZE": 8192,
    "NUM_LAYERS": 11,
    "MODEL_DIM": 512,
    "NUM_HEADS": 8,
    "NUM_KV_HEADS": 4,
    "MLP_MULT": 4.0,
    "XSA_LAST_N": 11,
    "LN_SCALE": True,
    "SKIP_GATES_ENABLED": True,
    "ROPE_BASE": 10000,
    "ROPE_DIMS": 16,
    "ROPE_YARN": False,
    "LOGIT_SOFTCAP": 30,
    "QK_GAIN_INIT": 5.0,
    "LOOP_START": 3,
    "LOOP_END": 5,
    "NUM_LOOPS": 2,
    "ENABLE_LOOPING_AT": 0.35,
    "PARALLEL_START_LAYER": 8,
    "SMEAR_GATE_ENABLED": "token",
    "GATE_WINDOW": 12,
    "SPARSE_ATTN_GATE_ENABLED": True,
    "SPARSE_ATTN_GATE_SCALE": 1.0,
    "TIED_EMBED_INIT_STD": 0.005,
    "TRAIN_BATCH_TOKENS": 786432,
    "TRAIN_SEQ_LEN": 2048,
    "ITERATIONS": 20000,
    "MAX_WALLCLOCK_SECONDS": 600,
    "WARMUP_STEPS": 20,
    "WARMDOWN_FRAC": 0.75,
    "MIN_LR": 0.1,
    "MATRIX_LR": 0.026,
    "SCALAR_LR": 0.02,
    "TIED_EMBED_LR": 0.03,
    "MUON_MOMENTUM": 0.97,
    "MUON_MOMENTUM_WARMUP_START": 0.92,
    "MUON_MOMENTUM_WARMUP_STEPS": 1500,
    "MUON_BACKEND_STEPS": 5,
    "MUON_ROW_NORMALIZE": True,
    "MUON_WD": 0.095,
    "EMBED_WD": 0.06,
    "ADAM_WD": 0.02,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "ADAM_EPS": 1e-8,
    "GRAD_CLIP_NORM": 0.3,
    "EMA_DECAY": 0.9965,
    "GPTQ_RESERVE_SECONDS": 0.5,
    "VAL_LOSS_EVERY": 0,
    "VAL_BATCH_TOKENS": 524288,
}


@pytest.mark.parametrize("index, name", [(0, "gptq-lite-379"), (1, "gepa-598"), (2, "legal-ttt-691")])
def test_sp1024_runs(index, name):
    values = resolve(name).values()
    for env, expected in SP1024_RUNS.items():
        assert values[recipe.ENVIRONMENT[env]] == expected[index], env


def test_caseops_run():
    values = resolve("caseops-1934").values()
    for env, expected in CASEOPS_RUN.items():
        assert values[recipe.ENVIRONMENT[env]] == expected, env


def test_the_environment_that_made_598_makes_its_settings_from_the_base():
    """The names of its own script, where they differ."""
    environ = dict(ITERATIONS="7000", MAX_WALLCLOCK_SECONDS="0", MLP_HIDDEN="1536", BIGRAM_BUCKETS="2048", XSA_LAYERS="4", EMA_ENABLED="1")
    model, schedule = (getattr(resolve("base", **environ).recipe, stage) for stage in ("model", "schedule"))
    assert (model.hidden_dim, model.bigram_buckets, model.xsa_last_n) == (1536, 2048, 4)
    assert (schedule.iterations, schedule.max_wallclock_seconds) == (7000, 0.0)


def test_values_from_text():
    overrides = ["model.ve_layers=3, 4", "model.value_embed=true", "optim.embed_wd=0.5", "optim.frozen_tensors=", "train.run_id=1"]
    values = resolve("gepa-598", *overrides).values()
    assert values["model.ve_layers"] == (3, 4) and values["model.value_embed"] is True
    assert values["optim.embed_wd"] == 0.5 and values["optim.frozen_tensors"] == () and values["train.run_id"] == "1"
    assert resolve("caseops-1934", "optim.embed_wd=none").recipe.optim.embed_wd is None
    assert resolve("caseops-1934", SMEAR_GATE_ENABLED="0").recipe.model.smear == "none"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.matrx_lr=1", "no setting 'optim.matrx_lr'; the nearest are optim.matrix_lr"),
        ("matrix_lr=1", "no setting 'matrix_lr'; the nearest are optim.matrix_lr"),
        ("optimizer.beta1=1", "no setting 'optimizer.beta1'; the nearest are optim.beta1"),
        ("MATRIX_LR=1", "MATRIX_LR is the environment's name of optim.matrix_lr"),
        ("train.seed", "expected setting=value, got 'train.seed'"),
        ("train.seed=1.5", "train.seed: expected a whole number from 0, got '1.5'"),
        ("train.seed=-1", "train.seed: expected a whole number from 0, got '-1'"),
        ("optim.matrix_lr=-0.1", "optim.matrix_lr: expected a finite number from 0, got '-0.1'"),
        ("train.seed=18446744073709551616", "train.seed: expected at most 64 bits, got 18446744073709551616"),
        ("schedule.min_lr=10", "schedule.min_lr: expected 0 to 1, got 10.0"),
        ("train.seed=", "train.seed: expected a whole number from 0, got ''"),
        ("optim.matrix_lr=nan", "optim.matrix_lr: expected a finite number from 0, got 'nan'"),
        ("model.attn_gate=yes", "model.attn_gate: expected true or false, got 'yes'"),
        ("model.smear=both", "model.smear: expected one of none, channel, token, got 'both'"),
        ("model.ve_layers=9;10", "model.ve_layers: expected a list of int"),
        ("optim.embed_wd=x", "optim.embed_wd: expected float or none"),
        ("model.num_heads=7", "model.num_heads: 7 does not divide model_dim 512"),
        ("optim.muon_tensors=qoo", "optim.muon_tensors: 'qoo' matches no parameter"),
        ("train.seq_len=1000", "train.batch_tokens: 786432 is no multiple of micro_batches x seq_len, 8000"),
        ("train.micro_batches=5", "train.batch_tokens: 786432 is no multiple of micro_batches x seq_len, 10240"),
    ],
)
def test_mistakes_on_the_command_line(override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        resolve("base", override)


@pytest.mark.parametrize("field", ["batch_tokens", "micro_batches", "seq_len", "val_batch_tokens", "log_every", "cu_seqlens_entries"])
def test_what_is_divided_by_is_at_least_1(field):
    with pytest.raises(UserError, match=f"train.{field}: expected at least 1, got 0"):
        resolve("base", f"train.{field}=0")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[optim]\nmatrx_lr = 1", "no setting 'optim.matrx_lr'; the nearest are optim.matrix_lr"),
        ("[optm]\nmatrix_lr = 1", "no setting 'optm.matrix_lr'; the nearest are optim.matrix_lr"),
        ("matrix_lr = 1", "no setting 'matrix_lr'; the nearest are optim.matrix_lr"),
        ('[optim]\nmatrix_lr = "0.1"', "optim.matrix_lr: expected a finite number from 0, got '0.1'"),
        ("[optim]\nmuon_steps = 5.0", "optim.muon_steps: expected a whole number from 0, got 5.0"),
        ("[optim]\nmatrix_lr = true", "optim.matrix_lr: expected a finite number from 0, got True"),
        ("[model]\nattn_gate = 1", "model.attn_gate: expected true or false, got 1"),
        ("[optim\n", "mine.toml: not a TOML file"),
        ('base = "nosuch"', "no recipe 'nosuch'; there are base, caseops-1934"),
        ('base = "mine.toml"', "is its own base"),
        ('base = "gone.toml"', "gone.toml: cannot be read"),
        ("base = 3", "base: expected text, got 3"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        resolve(write(tmp_path, text))


@pytest.mark.parametrize(
    "environ, message",
    [
        (dict(MARTIX_LR="1"), "MARTIX_LR looks like a mistyped MATRIX_LR"),
        (dict(MATRX_LR="1"), "MATRX_LR looks like a mistyped MATRIX_LR"),
        (dict(ITERATION="1"), "ITERATION looks like a mistyped ITERATIONS"),
        (dict(SEEDS="1"), "SEEDS looks like a mistyped SEED"),
        (dict(MAX_WALLCLOCK_SECOND="1"), "looks like a mistyped MAX_WALLCLOCK_SECONDS"),
        (dict(MATRIX_LR="fast"), "MATRIX_LR: optim.matrix_lr: expected a finite number from 0, got 'fast'"),
        (dict(SMEAR_GATE_ENABLED="2"), "SMEAR_GATE_ENABLED: expected one of 0, 1, got '2'"),
        (dict(TIE_EMBEDDINGS="0"), "TIE_EMBEDDINGS: only 1 is supported"),
    ],
)
def test_mistakes_in_the_environment(environ, message):
    with pytest.raises(UserError, match=message):
        resolve("base", **environ)


def test_strangers_in_the_environment_are_let_be():
    """Ordinary variables, and the challenge's names for stages that are no settings here."""
    ordinary = "PATH HOME USER TERM LANG PWD OMP_NUM_THREADS WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT CUDA_HOME NCCL_NET"
    other_stages = """LQER_RANK COMPRESSOR GPTQ_ENABLED MIXED_QUANT QUANT_EMBED DATA_DIR ARTIFACT_DIR"""
    strangers = dict.fromkeys((ordinary + " " + other_stages).split(), "something")
    strangers |= dict(MODEL_DIR="/opt/model", EMBED_LR="0.6", TIE_EMBEDDINGS="1", matrix_lrs="lower case is no name of the challenge")
    # Three letters from ITERATIONS: two left out or added and one another, three others.
    strangers |= dict.fromkeys(("ITERAXIS", "ITEXATIONSAB", "ITEXAXIOXS"), "5")
    assert resolve("base", **strangers).values() == resolve("base").values()


def test_unknown_recipe():
    with pytest.raises(UserError, match="no recipe 'gepa'; there are base, caseops-1934, gepa-598"):
        resolve("gepa")
    with pytest.raises(UserError, match="cannot be read"):
        resolve("nowhere/mine.toml")


def pgolf(*arguments):
    command = [sys.executable, "-m", "pgolf_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)


def test_command_line():
    """`pgolf recipes NAME --json` holds every setting with value, source and meaning, and nothing else on standard output."""
    done = pgolf("recipes", "tiny", "train.seed=7", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert settings.keys() == recipe.SETTINGS.keys()
    assert settings["train.seed"] | {"meaning": ""} == {"value": 7, "source": "command line", "meaning": ""}
    assert settings["model.num_layers"]["source"] == "tiny" and settings["model.smear"]["source"] == "base"


def test_command_line_mistake_is_one_line():
    done = pgolf("recipes", "tiny", "train.sed=7")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pgolf recipes: command line: there is no setting 'train.sed'; the nearest are train.seed, ")
