"""The audit catches what it must, passes what keeps the rules, and catches our own evaluators once they are broken."""

import itertools
import json
import socket
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf_fast import artifact, export, shards
from pgolf_fast.__main__ import main
from pgolf_fast.audit import contents, fixtures, invariants, subjects, watch
from pgolf_fast.audit.contents import audit_contents
from pgolf_fast.audit.invariants import DECLARED, FAIL, PASS, UNTESTED, audit
from pgolf_fast.audit.stream import make_stream, repeated_positions
from pgolf_fast.audit.subjects import Answer, of_function, of_strategy
from pgolf_fast.commands import audit as audit_command
from pgolf_fast.evaluation import sliding as sliding_module
from pgolf_fast.evaluation.sliding import SlidingWindow
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model import BOS
from tests.fuzz_artifact import index_of, reseal, with_index


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread and fewer runs of each kind: what the rest of them adds is certainty."""
    monkeypatch.setattr(invariants, "MAX_ENUMERATION_S", 0.0)
    monkeypatch.setattr(invariants, "SWAPS", 4)
    monkeypatch.setattr(invariants, "CUTS", (0.23, 0.71))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def verdicts(subject, *names):
    chosen = [i for i in invariants.INVARIANTS if i.__name__ in names] if names else invariants.INVARIANTS
    return {f.invariant: f for f in audit(subject, tuple(chosen))}


def broken(found):
    return {name for name, f in found.items() if f.verdict == FAIL}


# --- evaluators that are known ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", fixtures.FIXTURES, ids=lambda f: f.evaluate.__name__)
def test_each_known_evaluator_is_judged_as_it_should(fixture):
    caught = broken(verdicts(of_function(fixture.evaluate.__name__, fixture.evaluate)))
    assert fixture.caught_by in caught or not fixture.caught_by
    assert caught <= {fixture.caught_by, *fixture.also_by}


@pytest.mark.parametrize("name", audit_command.EVALUATORS)
def test_our_evaluators_pass(name):
    settings = subjects.recipe.overridden(subjects.default_settings(), (f"eval.evaluator={name}",))
    found = verdicts(subjects.of_recipe("small", settings))
    assert not broken(found) and UNTESTED not in {f.verdict for f in found.values()}, found
    assert "of 260 losses traced" in found["score-before-update"].evidence


@pytest.mark.parametrize(("name", "learns"), [("sliding", False), ("score-first-sgd", True), ("phased-lora", True)])
def test_our_evaluators_are_audited_while_their_weights_change(name, learns):
    settings = subjects.recipe.overridden(subjects.default_settings(), (f"eval.evaluator={name}",))
    forwards = subjects.of_recipe("small", settings).run(make_stream()).forwards
    steps = [i for i, forward in enumerate(forwards) if forward.targets is not None]  # for logits alone the referee asks
    assert bool(steps) == learns
    assert not learns or any(forward.targets is None for forward in forwards[steps[0] :]), "nothing is scored afterwards"


def test_the_published_self_distillation_is_caught_by_name():
    """PR #379 carried it switched off: it learns from the whole text before a legal evaluator scores it."""
    settings = subjects.recipe.overridden(subjects.default_settings(), ("sdttt.enabled=true", "sdttt.lr=0.05", "eval.evaluator=plain"))
    caught = broken(verdicts(subjects.of_recipe("small", settings)))
    assert {"future-flip", "score-before-update"} <= caught <= {*fixtures.READS_TARGETS, "score-before-update"}


def test_the_published_tail_is_no_second_pass():
    settings = subjects.recipe.overridden(subjects.default_settings(), ("eval.published_tail=true", "eval.evaluator=sliding"))
    assert not broken(verdicts(subjects.of_recipe("small", settings), "single_pass", "byte_denominator"))


def test_a_published_recipe_passes_with_its_own_parts():
    """The stack with loops, two lanes, a gate and a smear that reads the previous token."""
    found = verdicts(
        subjects.of_recipe("caseops-1934", subjects.recipe.resolve("caseops-1934", environ={}).recipe), "single_pass", "future_flip"
    )
    assert not broken(found)


# --- our own evaluators, broken ---------------------------------------------------------------------------------------


def of_sliding(make=lambda model: SlidingWindow(model, 32, 8, 128)):
    return of_strategy("mutant", make, subjects.default_settings())


@pytest.mark.parametrize(("shift", "said"), [(-1, "scored already"), (1, "positions are not scored")])
def test_a_window_that_is_off_by_one_is_refused(monkeypatch, shift, said):
    def shifted(*arguments, **options):
        windows = true_sliding(*arguments, **options)
        return Windows(windows.start, np.where(windows.first > 0, windows.first + shift, 0), windows.end)

    true_sliding = sliding_module.sliding
    monkeypatch.setattr(sliding_module, "sliding", shifted)
    found = verdicts(of_sliding())
    assert broken(found) == {"runs"} and said in found["runs"].evidence


class AsksTooEarly(SlidingWindow):
    """Adapts before it scores, through the referee."""

    def chunks(self, referee):
        with referee.adapt(referee.reveal(0, 64)):
            pass
        yield from super().chunks(referee)


def test_adapting_before_scoring_is_refused():
    found = verdicts(of_sliding(lambda model: AsksTooEarly(model, 32, 8, 128)))
    assert broken(found) == {"runs"} and "has not been scored" in found["runs"].evidence


class LearnsBehindTheReferee(SlidingWindow):
    """Takes the tokens out of the referee and learns from them before it scores, in a way that torch does not count as a change."""

    def __init__(self, model):
        super().__init__(model, 32, 8, 128)

    def chunks(self, referee):
        tokens = referee._tokens.long()
        gradients = torch.autograd.grad(self.model(tokens[None, :-1], tokens[None, 1:]), list(self.model.parameters()), allow_unused=True)
        for p, gradient in zip(self.model.parameters(), gradients):
            if gradient is not None:
                p.data.sub_(0.05 * gradient)
        yield from super().chunks(referee)


def test_learning_behind_the_referees_back_is_caught():
    found = verdicts(of_sliding(LearnsBehindTheReferee))
    assert broken(found) == {"future-flip", "target-swap", "normalisation", "score-before-update"}
    assert "version 1" in found["score-before-update"].evidence


# --- cheats beyond the fixtures ---------------------------------------------------------------------------------------


def own_log_probs(model, stream):
    with torch.no_grad():
        return model(stream.tokens[None, :-1])[0].log_softmax(-1)


def losses_of(log_probs, stream):
    return F.nll_loss(log_probs, stream.tokens[1:], reduction="none")


def function(evaluate, isolates=False):
    evaluate.isolates_documents = isolates
    return of_function(evaluate.__name__, evaluate)


def test_reading_one_token_too_far_is_caught_without_distributions():
    def shifted(model, stream):
        with torch.no_grad():
            log_probs = model(stream.tokens[None])[0, 1:].log_softmax(-1)
        return losses_of(log_probs, stream)

    found = verdicts(function(shifted))
    assert found["target-swap"].verdict == UNTESTED and "normalisation" in broken(found)


def test_a_single_distribution_that_does_not_add_up_to_one_is_caught():
    def generous_once(model, stream):
        log_probs = own_log_probs(model, stream)
        log_probs[5] += 0.01
        return losses_of(log_probs, stream), log_probs

    found = verdicts(function(generous_once))
    assert broken(found) == {"normalisation"} and "position 5 adds up to 1.01005" in found["normalisation"].evidence


def test_the_same_cheat_without_distributions_is_caught_by_summing():
    def hidden(model, stream):
        return fixtures.target_reading_ngram(model, stream).losses

    assert "normalisation" in broken(verdicts(function(hidden)))


def test_losses_that_are_not_the_models_own_are_no_proof_of_learning_too_early():
    def learns_and_mixes(model, stream):
        found = []
        for inputs, targets in fixtures._rows(stream, 64):
            for step in range(2):
                losses = F.cross_entropy(model(inputs[None])[0], targets, reduction="none")
                if step == 0:
                    found.append(-(0.7 * (-losses.detach()).exp() + 0.3 / len(stream.pieces)).log())
                gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients):
                        p.sub_(0.05 * g) if g is not None else None
        return torch.cat(found)

    found = verdicts(function(learns_and_mixes), "score_before_update")["score-before-update"]
    assert found.verdict == UNTESTED and "losses are not the model's own" in found.evidence


def test_losses_that_are_not_those_of_the_distributions_are_caught():
    def flattering(model, stream):
        log_probs = own_log_probs(model, stream)
        return losses_of(log_probs, stream) * 0.9, log_probs

    found = verdicts(function(flattering))
    assert broken(found) == {"normalisation"} and "its distribution gives" in found["normalisation"].evidence


def test_the_better_of_two_passes_is_caught():
    """Two honest predictions; which one counts depends on the token."""

    def best_of_two(model, stream):
        long = losses_of(own_log_probs(model, stream), stream)
        parts = [stream.with_tokens(stream.tokens[i : i + 21]) for i in range(0, len(stream), 20)]
        short = torch.cat([losses_of(own_log_probs(model, part), part) for part in parts])
        return torch.minimum(long, short)

    assert broken(verdicts(function(best_of_two))) == {"normalisation"}


def test_rescoring_after_learning_is_caught_by_name():
    def second_pass(model, stream):
        fixtures._train(model, stream.tokens[:-1], stream.tokens[1:])
        log_probs = own_log_probs(model, stream)
        return losses_of(log_probs, stream), log_probs

    assert "score-before-update" in broken(verdicts(function(second_pass), "score_before_update"))


def test_learning_that_is_scored_from_its_own_forward_is_legal():
    """One forward with gradients gives the loss, and then the update."""

    def one_forward(model, stream):
        found = []
        for inputs, targets in fixtures._rows(stream, 64):
            losses = F.cross_entropy(model(inputs[None])[0], targets, reduction="none")
            gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients):
                    p.sub_(0.05 * g) if g is not None else None
            found.append(losses.detach())
        return torch.cat(found)

    found = verdicts(function(one_forward))
    assert (
        not broken(found)
        and found["score-before-update"].verdict == PASS
        and "5 weight changes" not in found["score-before-update"].evidence
    )


def test_the_network_is_named_even_when_the_evaluator_hides_the_failure():
    def calls_home(model, stream):
        try:
            socket.create_connection(("127.0.0.1", 9), timeout=0.1)
        except Exception:
            pass
        return losses_of(own_log_probs(model, stream), stream)

    found = verdicts(function(calls_home))
    assert broken(found) == {"no network"} and "127.0.0.1" in found["no network"].evidence

    def needs_home(model, stream):
        return socket.getaddrinfo("localhost", 80)

    assert broken(verdicts(function(needs_home))) == {"no network"}
    socket.getaddrinfo("127.0.0.1", 9)  # outside the audit nothing is forbidden


def test_an_evaluator_that_is_not_repeatable_is_told_so():
    def noisy(model, stream):
        return losses_of(own_log_probs(model, stream), stream) + 0.01 * next(runs)

    runs = itertools.count()
    assert "repeatable" in broken(verdicts(function(noisy)))


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda x: x[:-1], "259 losses for 260"), (lambda x: x / 0, "not finite"), (lambda x: x - 5, "a probability above one")],
)
def test_losses_that_cannot_be_end_the_audit(change, said):
    def wrong(model, stream):
        return change(losses_of(own_log_probs(model, stream), stream))

    found = verdicts(function(wrong))
    assert list(found) == ["runs", "single pass"] and said in found["single pass"].evidence


def test_reading_across_documents_must_be_declared():
    def across(model, stream):
        return losses_of(own_log_probs(model, stream), stream)

    assert verdicts(function(across), "document_isolation")["document isolation"].verdict == DECLARED
    assert broken(verdicts(function(across, isolates=True))) == {"document isolation"}


def test_learning_across_documents_is_no_leak():
    """Documents are read alone, the weights learn from all of them."""

    def learns(model, stream):
        starts = [*stream.document_starts.tolist(), len(stream)]
        found = []
        for begin, end in zip(starts, starts[1:]):
            inputs, targets = stream.tokens[begin:end], stream.tokens[begin + 1 : end + 1]
            with torch.no_grad():
                found.append(F.cross_entropy(model(inputs[None])[0], targets, reduction="none"))
            fixtures._train(model, inputs, targets, steps=1)
        return torch.cat(found)

    found = verdicts(function(learns, isolates=True))
    assert not broken(found) and "5 weight changes" not in found["score-before-update"].evidence


# --- the parts ---------------------------------------------------------------------------------------------------------


def test_the_streams_bytes_are_those_of_its_text():
    stream = make_stream()
    assert stream.validation().target_bytes.sum() == stream.text_bytes == sum(len(t.encode()) for t in stream.texts)
    assert any(len(t) < len(t.encode()) for t in stream.texts) and any("  " in t or t.startswith(" ") for t in make_stream(seed=3).texts)
    assert len(repeated_positions(stream)) > 20


def test_probes_are_where_text_repeats_and_elsewhere_and_their_targets_can_be_swapped():
    stream = make_stream()
    probes = invariants._probes(stream, 600)
    assert not (stream.tokens[np.array(probes) + 1] == BOS).any() and min(probes) >= 0 and max(probes) < len(stream)
    assert set(repeated_positions(stream)) & set(probes) and set(probes) - set(repeated_positions(stream))


def test_swapping_keeps_documents_and_changes_everything_else():
    stream = make_stream()
    other = stream.swapped(np.arange(10, 261), 0)
    same = stream.tokens == other.tokens
    assert same[:10].all() and (same[10:] == (stream.tokens[10:] == BOS)).all()
    assert other.tokens.min() >= BOS and other.tokens[10:].max() < len(stream.pieces)
    many = torch.stack([stream.swapped(np.array([9]), seed).tokens[9] for seed in range(300)])
    assert set(many.tolist()) == set(range(2, len(stream.pieces))) - {int(stream.tokens[9])}  # any other word, and only words


def test_rows_are_found_in_the_stream_and_repeated_phrases_by_their_surroundings():
    tokens = make_stream().tokens.numpy()
    assert watch.locate(tokens[40:72], tokens).tolist() == list(range(40, 72))
    packed = np.concatenate([tokens[100:120], tokens[30:50], np.zeros(6, np.int64)])
    assert watch.locate(packed, tokens).tolist() == [*range(100, 120), *range(30, 50), *[-1] * 6]


def test_what_is_seen_of_a_forward_are_its_losses():
    subject = of_sliding()
    stream = make_stream()
    run = subject.run(stream)
    seen = watch.in_stream(run.forwards, stream)
    best = np.full(len(stream), np.inf)
    for forward in seen:
        np.minimum.at(best, forward.positions, np.abs(forward.losses - run.answer.losses.numpy()[forward.positions]))
    assert best.max() < 1e-5


@pytest.mark.parametrize("shape", [(), (1,), (1, 9), (1, 3, 48), (1, 1, 9, 48)], ids=str)
def test_what_a_forward_returns_beside_logits_of_its_tokens_tells_no_losses(shape):
    stream = make_stream()
    forward = watch.Forward(0, stream.tokens[None, :9], None, None, torch.zeros(shape), False)
    (seen,) = watch.in_stream([forward], stream)
    assert seen.positions.tolist() == list(range(9)) and seen.losses is None


def test_a_forward_whose_arguments_are_named_is_seen_too():
    def by_name(model, stream):
        with torch.no_grad():
            return model(tokens=stream.tokens[None, :-1], targets=stream.tokens[None, 1:], reduction="none")[0]

    stream = make_stream()
    run = function(by_name).run(stream)
    (seen,) = watch.in_stream(run.forwards, stream)
    assert seen.positions.tolist() == list(range(len(stream))) and seen.losses.tolist() == run.answer.losses.tolist()


def test_forgetting_undoes_learning():
    stream = make_stream()
    honest = of_function("honest", fixtures.honest)

    def without_learning(model, stream):
        parts = [stream.with_tokens(stream.tokens[i : i + 65]) for i in range(0, len(stream), 64)]
        return losses_of(torch.cat([own_log_probs(model, part) for part in parts]), stream)

    frozen = function(without_learning)
    assert torch.equal(honest.run(stream, forget=True).answer.losses, frozen.run(stream).answer.losses)
    assert not torch.equal(honest.run(stream).answer.losses, frozen.run(stream).answer.losses)


# --- artifacts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(file, tensors, metadata) of an artifact of the small recipe, and a folder with validation shards."""
    folder = tmp_path_factory.mktemp("artifact")
    settings = subjects.default_settings()
    tensors = {name: t.half() if t.dim() < 2 else t.bfloat16() for name, t in subjects.small_model(settings).published_tensors().items()}
    metadata = export.metadata("small", settings)
    (folder / "artifact.pglf").write_bytes(artifact.pack(tensors, metadata=metadata))
    shards.write_shard(folder / "fineweb_val_000000.bin", np.random.default_rng(0).integers(2, 1024, 4000).astype(np.uint16))
    return folder, tensors, metadata


def contents_of(path, data=None):
    described, found = audit_contents(path, data)
    return described, {f.invariant: f for f in found}


def test_a_clean_artifact(packed):
    folder, tensors, _ = packed
    described, found = contents_of(folder / "artifact.pglf", folder)
    assert {f.verdict for f in found.values()} == {PASS}, found
    assert described[0] == "small" and f"{len(tensors)} tensors" in found["declared tensors"].evidence
    assert contents_of(folder / "artifact.pglf")[1]["no validation text"].verdict == UNTESTED


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("place", [0, 3])
def test_planted_validation_text_is_found(packed, order, place):
    folder, _, _ = packed
    tokens = shards.read_split(shards.require_shards(folder, "val"))[1000:1080]
    planted = bytes(place) + tokens.astype(order).tobytes()
    tensors = {"w": torch.frombuffer(bytearray(planted.ljust(200, b"\0")), dtype=torch.float16).clone()}
    found = contents.no_validation_text(b"nothing", tensors, folder)
    # Of the positions that are sampled, every 64th, 1024 lies in what was planted.
    assert found.verdict == FAIL and found.evidence.startswith(f"w holds validation tokens at byte {place + 2 * 24}:")
    assert contents.no_validation_text(planted, {}, folder).verdict == FAIL


def test_what_no_recipe_declares_is_found(packed, tmp_path):
    folder, tensors, metadata = packed
    path = tmp_path / "a.pglf"
    path.write_bytes(artifact.pack(tensors | {"cache": torch.zeros(100)}, metadata=metadata))
    assert "weights, a model of its recipe has" in contents_of(path)[1]["declared tensors"].evidence
    path.write_bytes(artifact.pack(tensors, metadata=metadata | {"notes": "a"}))
    described, found = contents_of(path)
    assert found["declared tensors"].verdict == FAIL and "notes" in found["declared tensors"].evidence and described
    path.write_bytes(artifact.pack(tensors))
    described, found = contents_of(path)
    assert found["declared tensors"].verdict == FAIL and described is None


def test_bytes_that_no_tensor_needs_are_found(packed, tmp_path):
    """Here blanks in the index, with every checksum right."""
    folder, tensors, metadata = packed
    data = (folder / "artifact.pglf").read_bytes()
    _, matrices, rest = artifact._content(tensors, metadata)
    index = json.dumps(index_of(data), indent=1).encode()
    digest = artifact._content_digest(index, [m.codes for m in matrices], rest)
    (tmp_path / "a.pglf").write_bytes(reseal(with_index(data, index)[: -2 * artifact.DIGEST_BYTES] + digest + bytes(artifact.DIGEST_BYTES)))
    found = contents_of(tmp_path / "a.pglf")[1]["declared tensors"]
    assert found.verdict == FAIL and "packed again it gives other bytes" in found.evidence


def test_a_file_over_the_cap(packed, monkeypatch):
    monkeypatch.setattr(contents, "CAP_BYTES", 1000)
    assert contents_of(packed[0] / "artifact.pglf")[1]["size"].verdict == FAIL


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pgolf(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pgolf", "audit", *map(str, arguments), "--out", str(tmp_path / "audit.json")])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return done.value.code, out + err

    return call


CHEAT = """
import torch, torch.nn.functional as F
def make_model(vocab_size):
    return torch.nn.Sequential(torch.nn.Embedding(vocab_size, 8), torch.nn.Linear(8, vocab_size))
def fair(model, stream):
    with torch.no_grad():
        return F.cross_entropy(model(stream.tokens[None, :-1])[0], stream.tokens[1:], reduction="none")
def cheat(model, stream):
    return 0.9 * fair(model, stream)
"""


def test_a_file_of_somebody_else(pgolf, tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(CHEAT)
    code, said = pgolf(f"{path}:fair")
    assert code == 0 and "no rule that was tried is broken; not tested: target-swap, byte denominator" in said
    code, said = pgolf(f"{path}:cheat")
    assert code == 1 and "broken: normalisation" in said
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["passed"] is False and {f["invariant"]: f["verdict"] for f in written["findings"]}["normalisation"] == FAIL
    code, said = pgolf(f"{path}:nothing")
    assert code == 2 and "it has make_model, fair, cheat" in said


def test_an_artifact_and_the_evaluator_it_names(pgolf, packed):
    """Or, as for `pgolf eval`, the run's folder that it is in."""
    code, said = pgolf(packed[0], "--data", packed[0])
    assert code == 0 and "declared tensors" in said and "score-before-update" in said


def test_bad_subjects_are_one_sentence(pgolf, tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "no.pglf").write_bytes(b"not an artifact, but long enough to have a head of one, as it were" * 2)
    for subject, message in (
        ((), "give a packed artifact"),
        (("no-such-recipe",), "no file, recipe or evaluator 'no-such-recipe'"),
        (("gone.pglf",), "no file, recipe or evaluator 'gone.pglf' is here; known by name are base,"),
        ((tmp_path,), "and `pgolf pack"),
        (("no_module_of_this_name:f",), "cannot import"),
        ((f"{tmp_path / 'broken.py'}:f",), "nothing_of_this_name"),
        ((tmp_path / "no.pglf",), "not a pgolf artifact"),
    ):
        code, said = pgolf(*subject)
        assert code == 2 and message in said and len(said.splitlines()) == 1, said


def test_the_self_test_fails_when_a_cheat_goes_unseen(pgolf, monkeypatch):
    double = next(f for f in fixtures.FIXTURES if f.caught_by == "byte denominator")
    monkeypatch.setattr(fixtures, "FIXTURES", (double,))
    assert pgolf("--self-test")[0] == 0
    monkeypatch.setattr(fixtures, "FIXTURES", (fixtures.Fixture(double.evaluate, "target-swap"),))
    code, said = pgolf("--self-test")
    assert code == 1 and "does not tell" in said


def test_answers_of_a_wrong_shape_are_named():
    for returned, message in ((3.0, "one loss per position"), ((torch.zeros(260), torch.zeros(260, 3)), "log_probs")):
        with pytest.raises(subjects.UserError, match=message):
            list(audit(function(lambda model, stream, returned=returned: returned)))
    assert isinstance(of_function("x", lambda m, s: torch.zeros(260)).run(make_stream()).answer, Answer)


def test_a_recipe_may_be_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "tiny"\n[eval]\nevaluator = "plain"\n')
    subject, found = audit_command._resolve(audit_command.Audit(str(tmp_path / "mine.toml")))
    assert subject.name.endswith("mine.toml: plain") and not found
