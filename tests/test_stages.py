"""The three stages, whole, on a world of a few pictures: what a run leaves behind opens and is what
it says it is."""

import importlib.util
import json
import math
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, strict_records, tiny_config
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import AutoModelForImageTextToText

import align
import model
import rlvr
import sft
from data import SPANS, read
from engine import evaluation
from engine.arguments import parse
from engine.log import Log
from engine.optimiser import step_if_finite
from engine.packs import Tree, build_pack, plan
from engine.ranks import SAVED_AND_STOPPED, setup
from tools.init import init

COMMON = dict(device="cpu", sample_every=0, save_every=0)
ROLLOUTS = dict(max_response=32, prompts_per_step=4, group_size=4)
GAME = dict(steps=2, lr=1e-3, disc_lr=1e-3, warmup_steps=0, probe_every=1) | ROLLOUTS | COMMON
EVERY_STEP = (
    "loss",
    "grad_norm",
    "entropy",
    "tokens",
    "logp_diff",
    "logp_diff_max",
    "format",
    "accuracy",
    "reward",
    "length",
    "truncated",
    "informative",
    "lr",
)
OF_RLVR = ("clip_frac", "ratio_max", "draws", "sampled", "groups", "surplus", "dropped")
OF_A_SPAN = (
    "acc",
    "margin",
    "margin_p10",
    "margin_p90",
    "saturated",
    "reference_mean",
    "reference_std",
    "policy_mean",
    "policy_std",
    "policy_absmax",
    "group_std",
    "flat_groups",
    "longer",
    "clipped",
    "leak",
    "length_probe",
)


def build_world(folder):
    """Rows of tools/scenes.py with one or two objects, a configuration, and a policy that writes
    the three parts about half of the time: some rollouts are malformed, as in a real run."""
    spec = importlib.util.spec_from_file_location("scenes", ROOT / "tools/scenes.py")
    scenes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenes)
    for name, rows in {"curated": 32, "align": 24, "pairs": 24, "rl": 12}.items():
        scenes.FILES[name] = replace(scenes.FILES[name], objects=(1, 2), matches=1)
        scenes.write(folder / f"{name}.jsonl", scenes.make(folder, name, rows, 0))
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    world = SimpleNamespace(folder=folder, sft=f"{folder}/sft/last", config=f"{folder}/config.json")
    world.init = str(init(world.config, folder / "init", [folder / "curated.jsonl"]))
    for name in ("curated", "align", "pairs", "rl"):
        setattr(world, name, f"{folder}/{name}.jsonl")
    sft.main(
        sft.Args(
            policy=world.init,
            data=world.curated,
            out=f"{folder}/sft",
            steps=60,
            batch=8,
            lr=0.01,
            warmup=3,
            log_every=30,
            freeze_vision=False,  # its weights are random
            **COMMON,
        )
    )
    return world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def leave_no_group():
    """A run that a test interrupts leaves its process group and its signal handler behind."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def records(folder):
    return [record for record in strict_records(f"{folder}/log.jsonl") if "step" in record]


def weights(folder):
    return {
        k: v
        for file in sorted(Path(folder).glob("*.safetensors"))
        for k, v in load_file(file).items()
    }


def same(a, b):
    assert a.keys() == b.keys() and a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def moved(a, b):
    return any(not torch.equal(a[k], b[k]) for k in a if k in b)


def opens_everywhere(folder, world):
    """Plain transformers computes from the folder what our loader does; the tokenizer is beside the
    weights."""
    policy = model.load(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    prompt = policy.encoder.prompt(read(world.align, "align")[0])
    answer = policy.encoder.response("<caption> tl red square </caption>")
    with torch.no_grad():
        logp = policy(build_pack([Tree(prompt, [answer])], [(0, [0])]))
        ids = torch.cat([prompt.ids, torch.tensor(answer)])[None]
        kinds = (ids == policy.hf.config.image_token_id).int()
        logits = plain(
            input_ids=ids,
            mm_token_type_ids=kinds,
            **prompt.images,
        ).logits[0, -len(answer) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-5)


def finite(record, names):
    bad = {name: record.get(name, "missing") for name in names if record.get(name) is None}
    assert not bad, f"step {record['step']}: {bad}"


def check_game(out, spans=("perception", "reasoning"), steps=2):
    found = records(out)
    assert [r["step"] for r in found] == list(range(1, steps + 1))
    for r in found:
        of_spans = [f"{span}/{name}" for span in spans for name in OF_A_SPAN]
        finite(r, [*EVERY_STEP, "disc_loss", "disc_grad_norm", *of_spans])
        assert r["logp_diff_max"] < 1e-4  # sampled as it is scored
        assert r["skipped"] == r["disc_skipped"] == r["left_out"] == 0
        assert abs(r[f"{spans[0]}/leak"] - 0.5) <= 0.05
    return found


def scores(disc, world, policy):
    """Scores of two spans after one prompt, in one pack."""
    encoder = policy.encoder
    spans = [
        encoder.response("<caption> tl red square </caption>"),
        encoder.response("<think> so 3 . </think>"),
    ]
    tree = Tree(encoder.prompt(read(world.align, "align")[0]), spans, kinds=[0, 1])
    with torch.no_grad():
        return disc(build_pack([tree], plan([tree], 10_000)[0]))[0]


# ----------------------------------------------------------------------------- stage 1


def test_sft_learns_and_logs(world):
    found = records(f"{world.folder}/sft")
    assert [r["step"] for r in found] == list(range(1, 61))
    for r in found:
        finite(r, ["loss", "grad_norm", "tokens", "lr", "epoch", "seconds"])
    assert (
        found[0]["loss"] > 3 and found[-1]["loss"] < 1
    )  # uniform over the vocabulary would be ln 60 = 4.1
    opens_everywhere(world.sft, world)
    meta = json.loads(Path(world.sft, "meta.json").read_text())
    assert meta["step"] == 60 and meta["args"]["lr"] == 0.01


def test_sft_continues_from_a_checkpoint_of_its_own(world, tmp_path):
    sft.main(
        sft.Args(
            policy=world.sft, data=world.curated, out=str(tmp_path), steps=1, batch=32, **COMMON
        )
    )
    assert records(tmp_path)[0]["loss"] < 1


def test_sft_counts_epochs(world, tmp_path):
    args = dict(policy=world.sft, data=world.curated, batch=8, **COMMON)
    sft.main(sft.Args(out=str(tmp_path), epochs=0.5, **args))
    assert [r["epoch"] for r in records(tmp_path)] == [0.25, 0.5]


def test_sft_loss_does_not_depend_on_the_packs(world, tmp_path):
    for name, budget in (("one", 16384), ("many", 64)):
        sft.main(
            sft.Args(
                policy=world.sft,
                data=world.curated,
                out=str(tmp_path / name),
                steps=1,
                batch=8,
                pack_tokens=budget,
                lr=1e-3,
                **COMMON,
            )
        )
    (one,), (many,) = records(tmp_path / "one"), records(tmp_path / "many")
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-4)


# ----------------------------------------------------------------------------- stage 2

FORMS = {
    "moe": {},
    "experts": dict(disc="experts"),
    "dense": dict(disc="dense"),
    "blind": dict(disc_blind=True),
    "whole": dict(spans="whole"),
    "sum": dict(normalize="sum"),
    "drop": dict(malformed="drop"),
    "split": dict(pack_tokens=48),
}


@pytest.mark.parametrize("form", FORMS)
def test_game(world, tmp_path, form):
    args = align.Args(policy=world.sft, data=world.align, out=str(tmp_path), **GAME | FORMS[form])
    align.main(args)
    names = ("whole",) if args.spans == "whole" else ("perception", "reasoning")
    found = check_game(tmp_path, names)
    assert 0 < sum(r["format"] for r in found) < 2  # some rollouts are malformed, and some are not
    assert not any(k.startswith("reasoning") for r in found for k in r) or args.spans == "both"
    assert (f"{names[0]}/expert_3" in found[0]) == (args.disc == "moe")
    opens_everywhere(tmp_path / "last", world)
    assert moved(weights(world.sft), weights(tmp_path / "last"))

    disc = align.load_discriminator(replace(args, disc_path=f"{tmp_path}/last/discriminator"))
    other = align.load_discriminator(args)
    policy = model.load(tmp_path / "last")
    assert torch.isfinite(scores(disc, world, policy)).all()
    assert not torch.equal(scores(disc, world, policy), scores(other, world, policy))


def test_what_one_flag_changes(world, tmp_path):
    """The same rollouts, scored by the same discriminator: only the advantage may differ."""
    found = {}
    for name, flags in {
        "span": {},
        "sum": dict(normalize="sum"),
        "drop": dict(malformed="drop"),
        "v": dict(alpha=1.0),
    }.items():
        align.main(
            align.Args(
                policy=world.sft,
                data=world.align,
                out=str(tmp_path / name),
                **GAME | flags | dict(steps=1),
            )
        )
        found[name] = records(tmp_path / name)[0]
    for key in ("disc_loss", "format", "length", "perception/margin"):
        assert len({r[key] for r in found.values()}) == 1, key
    assert len({r["grad_norm"] for r in found.values()}) == len(found)


def test_a_blind_discriminator_reads_no_image(world, tmp_path):
    """Two pictures, the same text: only one that sees them scores them differently."""
    rows = [json.loads(line) for line in Path(world.align).read_text().splitlines()]
    for row in rows:
        row |= {"prompt": rows[0]["prompt"], "teacher_response": rows[0]["teacher_response"]}
    path = world.folder / "one_text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for blind in (False, True):
        out = tmp_path / str(blind)
        align.main(
            align.Args(
                policy=world.sft,
                data=str(path),
                out=str(out),
                disc_blind=blind,
                **GAME | dict(steps=1),
            )
        )
        (found,) = records(out)
        assert (found["perception/reference_std"] < 1e-6) == blind


def test_discriminator_learns_what_it_is_told(world, tmp_path):
    """Warm-up on pairs whose sides differ in manner: it tells them apart, stops by itself, and is
    saved as it is."""
    flags = dict(
        pairs=world.pairs, warmup_steps=80, warmup_pairs=16, warmup_lr=1e-2, upcycle_noise=0.0
    )
    args = align.Args(
        policy=world.sft, data=world.align, out=str(tmp_path), warmup_only=True, **GAME | flags
    )
    align.main(args)
    found = records(tmp_path / "warmup")
    assert found[0]["loss"] == pytest.approx(2 * math.log(2), abs=0.1)
    assert sum(record["loss"] for record in found[-5:]) / 5 < 0.5 and len(found) < 80
    assert min(found[-1][f"{s}/held_out"] for s in SPANS) >= 0.9
    assert not (tmp_path / "last").exists() and not (tmp_path / "log.jsonl").exists()

    warmed = tmp_path / "warmup/last"
    start_from = align.Args(
        policy=world.sft,
        data=world.align,
        out=str(tmp_path / "game"),
        disc_path=str(warmed),
        **GAME,
    )
    policy = model.load(world.sft)
    before = scores(align.load_discriminator(start_from), world, policy)
    align.main(start_from)
    check_game(tmp_path / "game")
    assert not (tmp_path / "game/warmup").exists()
    after = align.load_discriminator(
        replace(start_from, disc_path=f"{tmp_path}/game/last/discriminator")
    )
    assert not torch.equal(scores(after, world, policy), before)
    # What is written is what was in memory: saved again, it gives the same tensors and scores.
    align.save_discriminator(after, world.sft, tmp_path / "again")
    same(weights(tmp_path / "again"), weights(tmp_path / "game/last/discriminator"))
    again = align.load_discriminator(replace(start_from, disc_path=f"{tmp_path}/again"))
    assert torch.equal(scores(again, world, policy), scores(after, world, policy))
    with pytest.raises(ValueError, match="--disc moe"):
        align.load_discriminator(replace(start_from, disc="dense"))


def test_warm_up_from_rollouts_precedes_the_game(world, tmp_path):
    flags = dict(warmup_steps=2, warmup_pairs=16, steps=1)
    align.main(align.Args(policy=world.sft, data=world.align, out=str(tmp_path), **GAME | flags))
    warm = records(tmp_path / "warmup")
    assert [r["step"] for r in warm] == [1, 2]
    for r in warm:
        finite(r, ["loss", "grad_norm", *(f"{s}/{k}" for s in SPANS for k in ("acc", "margin"))])
    finite(warm[-1], ["perception/held_out", "reasoning/held_out"])
    check_game(tmp_path, steps=1)
    assert moved(weights(tmp_path / "warmup/last"), weights(tmp_path / "last/discriminator"))


def test_groups_are_kept_to_be_looked_at(world, tmp_path):
    """What tools/report.py shows: whole groups, with the reference and its scores where the stage
    has them."""
    kept = {}
    for stage, data in ((align, world.align), (rlvr, world.rl)):
        flags = GAME if stage is align else ROLLOUTS | COMMON
        out = str(tmp_path / stage.__name__)
        stage.main(
            stage.Args(
                policy=world.sft, data=data, out=out, **flags | dict(steps=1, sample_every=1)
            )
        )
        found = [json.loads(line) for line in Path(out, "rollouts.jsonl").read_text().splitlines()]
        assert [(r["step"], r["stage"], len(r["rollouts"])) for r in found] == [
            (1, stage.__name__, 4)
        ]
        assert all(
            r["images"][0].startswith("data:image/png") and r["answer"] and r["question"]
            for r in found
        )
        kept[stage] = [rollout for r in found for rollout in r["rollouts"]]
        assert all(math.isfinite(rollout["advantage"]) for rollout in kept[stage])
        if stage is align:
            assert all(
                "<caption>" in r["reference"] and r["reference_scores"].keys() == {*SPANS}
                for r in found
            )
            theirs, ours = (
                found[0]["reference_scores"],
                [r["scores"] for r in found[0]["rollouts"] if r["scores"]["format"]],
            )
            assert (
                all(abs(theirs[name] - scores[name]) > 2e-4 for name in SPANS for scores in ours)
                and ours
            )
    assert {tuple(r["scores"]) for r in kept[align]} == {(*SPANS, "accuracy", "format", "reward")}
    assert all(
        (r["scores"]["perception"] is None) == (r["scores"]["format"] == 0) for r in kept[align]
    )
    assert {tuple(r["scores"]) for r in kept[rlvr]} == {("accuracy", "format", "reward")}


# ----------------------------------------------------------------------------- stage 3


@pytest.mark.parametrize("algo", rlvr.ALGORITHMS)
def test_rlvr(world, tmp_path, algo):
    flags = dict(overlong=8, prompts_per_draw=4, max_draws=3, warmup=1) if algo == "dapo" else {}
    flags |= dict(algo=algo, steps=3, lr=1e-3) | ROLLOUTS | COMMON
    rlvr.main(rlvr.Args(policy=world.sft, data=world.rl, out=str(tmp_path), **flags))
    found = records(tmp_path)
    assert [r["step"] for r in found] == [1, 2, 3]
    for r in found:
        finite(r, [*EVERY_STEP, *OF_RLVR])
        assert r["logp_diff_max"] < 1e-4 and r["skipped"] == r["left_out"] == 0
        assert r["sampled"] == 4 * r["draws"] and r["groups"] <= 4
        assert algo == "dapo" or (r["draws"] == 1 and r["groups"] == 4 and r["surplus"] == 0)
    assert any(r["grad_norm"] > 0 for r in found)
    assert any(0 < r["accuracy"] < 1 for r in found)
    opens_everywhere(tmp_path / "last", world)
    assert moved(weights(world.sft), weights(tmp_path / "last"))


def test_minibatches_leave_the_policy_that_sampled(world, tmp_path):
    flags = (
        dict(minibatches=2, kl=0.1, lr=3e-3, clip_low=1e-4, clip_high=1e-4, steps=1)
        | ROLLOUTS
        | COMMON
    )
    rlvr.main(rlvr.Args(policy=world.sft, data=world.rl, out=str(tmp_path), **flags))
    (first,) = records(tmp_path)
    finite(first, [*EVERY_STEP, *OF_RLVR, "kl"])
    assert first["ratio_max"] > 1 and first["clip_frac"] > 0  # the second minibatch's ratios
    assert first["logp_diff_max"] < 1e-4  # under the policy that sampled, in each minibatch
    assert first["kl"] > 1e-4  # the second minibatch is away from the start policy


def test_kl_is_nothing_at_the_start(world, tmp_path):
    rlvr.main(
        rlvr.Args(
            policy=world.sft, data=world.rl, out=str(tmp_path), kl=0.1, steps=1, **ROLLOUTS | COMMON
        )
    )
    assert records(tmp_path)[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_more_minibatches_than_groups(world, tmp_path):
    """Dynamic sampling may end with fewer groups than there are minibatches: those without a group
    make no update and count in no mean."""
    flags = dict(algo="dapo", overlong=8, prompts_per_draw=4, max_draws=1, minibatches=4, steps=1)
    args = rlvr.Args(
        policy=world.sft, data=world.rl, out=str(tmp_path), **ROLLOUTS | COMMON | flags
    )
    norms = []

    def step(opt, loss, max_norm, who):
        norms.append(step_if_finite(opt, loss, max_norm, who))
        return norms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr, "step_if_finite", step)
        rlvr.main(args)
    (found,) = records(tmp_path)
    assert 0 < found["groups"] < 4 and len(norms) == found["groups"]
    assert found["grad_norm"] == pytest.approx(sum(norm for norm, _ in norms) / len(norms))


def test_derived_values_are_no_arguments(world, tmp_path):
    """A run's meta.json holds what was given: with other epochs, or another algorithm, it is not
    the old run's steps or clips that count."""
    args = sft.Args(policy=world.sft, data=world.curated, out=str(tmp_path), batch=16, **COMMON)
    sft.main(args)
    meta = str(tmp_path / "last/meta.json")
    again = parse(sft.Args, ["--config", meta, "--epochs", "0.5", "--out", str(tmp_path / "half")])
    sft.main(again)
    assert [r["epoch"] for r in records(tmp_path / "half")] == [0.5]
    grpo = rlvr.Args(policy="p", data=world.rl, out="o", max_response=9000)
    Path(meta).write_text(json.dumps({"args": vars(grpo)}))
    dapo = rlvr.chosen_algorithm(parse(rlvr.Args, ["--config", meta, "--algo", "dapo"]))
    assert dapo == rlvr.ALGORITHMS["dapo"]
    mine = parse(rlvr.Args, ["--config", meta, "--algo", "dapo", "--clip_high", "0.5"])
    assert rlvr.chosen_algorithm(mine) == replace(rlvr.ALGORITHMS["dapo"], clip_high=0.5)


def test_each_span_needs_a_weight(monkeypatch):
    """Said before anything is loaded, not where the first advantage is made."""
    monkeypatch.setattr(align, "SPANS", {"perception": ("caption",), "plan": (), "reasoning": ()})
    with pytest.raises(ValueError, match="each span needs a weight"):
        align.Args(policy="p", data="d")
    align.Args(policy="p", data="d", spans="whole")


def test_what_a_reward_says_beside_is_logged(world, tmp_path, monkeypatch):
    """Another key of the verdict is in the log and with the rollouts, malformed ones included."""

    def verify(text, example, plain=rlvr.verify):
        return plain(text, example) | {"words": float(len(text.split()))}

    for stage, data in ((align, world.align), (rlvr, world.rl)):
        monkeypatch.setattr(stage, "verify", verify)
        args = dict(policy=world.sft, data=data, steps=1, max_response=32, group_size=4)
        args |= COMMON | dict(prompts_per_step=4, sample_every=1)
        args |= dict(warmup_steps=0) if stage is align else {}
        out = tmp_path / stage.__name__
        stage.main(stage.Args(**args, out=str(out)))
        (record,) = records(out)
        assert record["words"] > 0 and 0 <= record["accuracy"] <= record["format"] < 1
        group = json.loads((out / "rollouts.jsonl").read_text())
        for rollout in group["rollouts"]:
            assert rollout["scores"]["words"] == len(rollout["text"].split())


def test_a_change_of_the_policy_loss_takes_effect_on_policy(world, tmp_path, monkeypatch):
    """With one minibatch the loss's gradient is taken as known: it is asked of the loss itself, and
    where it is another at the real log-probs, that is said."""
    plain = rlvr.policy_loss
    args = dict(policy=world.sft, data=world.rl, steps=1, max_response=32, group_size=4)
    args |= COMMON | dict(prompts_per_step=4)

    def run(name, loss_function):
        monkeypatch.setattr(rlvr, "policy_loss", loss_function)
        rlvr.main(rlvr.Args(**args, out=str(tmp_path / name)))
        return records(tmp_path / name)[0]

    def doubled(*batch, **options):
        loss, metrics = plain(*batch, **options)
        return 2 * loss, metrics

    def of_probabilities(logp, *batch, **options):
        loss, metrics = plain(logp, *batch, **options)
        return loss + logp.exp().sum(), metrics

    once, twice = run("once", plain), run("twice", doubled)
    assert once["grad_norm"] > 0
    assert twice["grad_norm"] == pytest.approx(2 * once["grad_norm"], rel=1e-4)
    assert twice["loss"] == pytest.approx(2 * once["loss"], rel=1e-4)
    with pytest.raises(ValueError, match="another gradient than `coefficient`"):
        run("other", of_probabilities)


def test_no_group_to_learn_from_is_counted_and_changes_nothing(world, tmp_path):
    rows = [json.loads(line) for line in Path(world.rl).read_text().splitlines()]
    for row in rows:
        row["reward_model"]["ground_truth"] = "never"
    path = world.folder / "never.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        dict(algo="dapo", overlong=0, prompts_per_draw=4, max_draws=2, steps=1) | ROLLOUTS | COMMON
    )
    rlvr.main(rlvr.Args(policy=world.sft, data=str(path), out=str(tmp_path), **flags))
    (found,) = records(tmp_path)
    assert (found["draws"], found["groups"], found["skipped"]) == (2, 0, 1)
    assert found["loss"] is None
    same(weights(world.sft), weights(tmp_path / "last"))


# ----------------------------------------------------------------------------- flags, and resuming


def test_rows_that_cannot_be_used_are_counted_and_stop_the_run_past_max_bad(world, tmp_path):
    rows = [json.loads(line) for line in Path(world.curated).read_text().splitlines()]
    rows[3]["images"] = ["images/none.png"]
    rows[5]["images"] = []
    path = world.folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = dict(policy=world.sft, data=str(path), steps=1, batch=32, **COMMON)
    sft.main(sft.Args(out=str(tmp_path / "some"), **args))
    assert records(tmp_path / "some")[0]["left_out"] == 2
    with pytest.raises(ValueError, match="bad.jsonl.*rows are bad"):
        sft.main(sft.Args(out=str(tmp_path / "none"), max_bad=1, **args))


def test_image_root(world, tmp_path):
    for name, stage, flags in (
        ("curated", sft, dict(batch=2)),
        ("align", align, GAME),
        ("rl", rlvr, ROLLOUTS),
    ):
        moved_file = tmp_path / f"{name}.jsonl"
        moved_file.write_text(Path(getattr(world, name)).read_text())
        flags = (
            COMMON | flags | dict(steps=1, image_root=str(world.folder), out=str(tmp_path / name))
        )
        stage.main(stage.Args(policy=world.sft, data=str(moved_file), **flags))
        assert records(tmp_path / name)[0]["left_out"] == 0


def interrupted(stage, args, monkeypatch, at):
    """Run `stage` with a SIGTERM in the update number at[0] of the first run (from 0), at[1] of the
    second, which resumes, and so on; then to its end."""
    plain = Log.step
    for update in at:
        count = iter(range(100))

        def step(log, *args, count=count, update=update):
            if next(count) == update:
                signal.raise_signal(signal.SIGTERM)
            return plain(log, *args)

        monkeypatch.setattr(Log, "step", step)
        with pytest.raises(SystemExit) as stop:
            stage.main(args)
        assert stop.value.code == SAVED_AND_STOPPED
        torch.manual_seed(99)  # nothing but the checkpoint may carry the run on
        args = replace(args, resume=True)
    monkeypatch.setattr(Log, "step", plain)
    stage.main(args)


def tensors(folder):
    """Everything `--resume` needs: the players' parameters and their optimisers' moments."""
    import torch.distributed.checkpoint as dcp

    found = dcp.FileSystemReader(Path(folder, "resume")).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in found.items()}
    dcp.load(state, checkpoint_id=Path(folder, "resume"))
    return state


STAGES = {
    "sft": (sft, "curated", dict(batch=8, steps=4, lr=1e-2, warmup=0.5), [1]),
    "align": (
        align,
        "align",
        GAME | dict(steps=4, warmup_steps=3, warmup_pairs=16, probe_every=0),
        [1, 2],
    ),
    "rlvr": (
        rlvr,
        "rl",
        ROLLOUTS
        | dict(
            algo="dapo",
            prompts_per_step=2,
            prompts_per_draw=12,
            overlong=8,
            minibatches=2,
            steps=4,
            lr=1e-3,
        ),
        [0],
    ),
}


def with_bad_rows(file):
    """A copy of a data file beside it, where every fifth row is broken."""
    lines = Path(file).read_text().splitlines(keepends=True)
    for number in range(0, len(lines), 5):
        lines.insert(number, '{"broken": \n')
    copy = Path(file).with_suffix(".bad.jsonl")
    copy.write_text("".join(lines))
    return str(copy)


@pytest.mark.parametrize("name", STAGES)
def test_resume_is_bitwise(world, tmp_path, monkeypatch, name):
    """The whole run reads its rows in the main thread, the one in parts has threads that read them
    ahead of their time: what they have read and nobody has drawn goes into no checkpoint."""
    stage, data, flags, at = STAGES[name]
    args = stage.Args(
        policy=world.sft,
        data=with_bad_rows(getattr(world, data)),
        out=str(tmp_path / "whole"),
        workers=0,
        **COMMON | flags,
    )
    stage.main(args)
    parts = replace(args, out=str(tmp_path / "parts"), workers=2)
    interrupted(stage, parts, monkeypatch, at)
    whole, parts = tmp_path / "whole/last", tmp_path / "parts/last"
    same(weights(whole), weights(parts))
    same(tensors(whole), tensors(parts))
    one, two = records(tmp_path / "whole"), records(tmp_path / "parts")
    starts = [
        json.loads(line).get("done")
        for line in Path(tmp_path, "parts/log.jsonl").read_text().splitlines()
    ]
    assert [n for n in starts if n is not None] == {"sft": [0, 2], "align": [0, 2], "rlvr": [0, 1]}[
        name
    ]
    for a, b in zip(one, two, strict=True):
        other = {k for k in a if a[k] != b[k] and a[k] == a[k]} - {"seconds"}
        # A process counts the bad rows that it has met itself.
        assert other <= ({"left_out"} if name == "align" or a["step"] > at[0] + 1 else set())
    assert one[-1]["left_out"] > 0 < two[-1]["left_out"]
    if name == "align":
        same(weights(whole / "discriminator"), weights(parts / "discriminator"))
        same(tensors(tmp_path / "whole/warmup/last"), tensors(tmp_path / "parts/warmup/last"))
    if name == "rlvr":
        assert one[0]["surplus"] > 0  # the surplus groups went through the checkpoint
        assert (
            max(r["logp_diff_max"] for r in one) < 1e-4
        )  # their old log-probs are of the policy that sampled them


def test_resume_without_a_checkpoint_starts_afresh(world, tmp_path):
    sft.main(
        sft.Args(
            policy=world.init,
            data=world.curated,
            out=str(tmp_path),
            steps=1,
            batch=8,
            resume=True,
            **COMMON,
        )
    )
    assert [r["step"] for r in records(tmp_path)] == [1]


def test_a_run_is_not_overwritten(world, tmp_path):
    args = sft.Args(
        policy=world.sft, data=world.curated, out=str(tmp_path), steps=1, batch=8, **COMMON
    )
    Log(tmp_path, args)
    with pytest.raises(SystemExit, match="--resume"):
        sft.main(args)


# ----------------------------------------------------------------------------- frozen vision


def of_vision(tensors):
    return {key: tensor for key, tensor in tensors.items() if "visual." in key}


@pytest.mark.parametrize("name", STAGES)
def test_frozen_vision_is_not_trained(world, tmp_path, name):
    """Tower and mergers of every player stay as they were and have no optimiser state; the rest is
    trained. Stage 1 freezes them by default."""
    stage, data, flags, _ = STAGES[name]
    flags = COMMON | flags | dict(steps=1, warmup_steps=0)
    flags |= {"warmup": 0.0, "batch": 4} if stage is sft else {"freeze_vision": True}
    flags = {key: flags[key] for key in flags if key in stage.Args.__dataclass_fields__}
    out = tmp_path / "out"
    stage.main(stage.Args(policy=world.sft, data=getattr(world, data), out=str(out), **flags))
    before = weights(world.sft)
    players = ["last", "last/discriminator"] if stage is align else ["last"]
    for player in players:
        after = weights(out / player)
        vision = {key.removeprefix("model."): x for key, x in of_vision(after).items()}
        same({key.removeprefix("model."): x for key, x in of_vision(before).items()}, vision)
        assert moved(before, {key: x for key, x in after.items() if "visual." not in key})
    moments = [key for key in tensors(out / "last") if ".optimizer." in key]
    assert moments and not [key for key in moments if "visual." in key]


def test_vision_is_trained_unless_it_is_frozen(world, tmp_path):
    flags = COMMON | dict(steps=1, batch=4, lr=1e-2, warmup=0.0, freeze_vision=False)
    sft.main(sft.Args(policy=world.sft, data=world.curated, out=str(tmp_path), **flags))
    assert moved(of_vision(weights(world.sft)), of_vision(weights(tmp_path / "last")))
    assert [key for key in tensors(tmp_path / "last") if ".optimizer." in key and "visual." in key]
    flags |= dict(steps=2, freeze_vision=True, resume=True)
    with pytest.raises(ValueError, match="cannot be resumed: .*begun with --no-freeze_vision"):
        sft.main(sft.Args(policy=world.sft, data=world.curated, out=str(tmp_path), **flags))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_tower_has_no_graph_and_is_not_gathered_again(world, monkeypatch, frozen):
    """Sharded, it runs in each forward, of text alone too, and the backward pass needs it not."""
    args = sft.Args(policy=world.sft, data="d", out="o", dtype="bfloat16", device="cpu")
    ranks = setup(args)
    policy = model.load(world.sft).train()
    if frozen:
        model.freeze_vision(policy.hf.model)
    visual = policy.hf.model.visual
    model.shard(policy, policy.hf.model, args, ranks)
    has_graph = []

    def look(module, inputs, output):
        has_graph.append(output.pooler_output.requires_grad)

    visual.register_forward_hook(look)
    gathered = []
    plain = FSDPParamGroup.unshard

    def unshard(group, *options):
        needed = not group.is_unsharded
        plain(group, *options)
        if needed and group._all_gather_result is not None and visual in group.modules:
            gathered.append(group._training_state.name)

    monkeypatch.setattr(FSDPParamGroup, "unshard", unshard)
    prompt = policy.encoder.prompt(read(world.align, "align")[0])
    text = replace(prompt, ids=prompt.ids[-4:], positions=torch.arange(4).expand(3, -1))
    text = replace(text, images={})
    for made in (prompt, text):
        response = policy.encoder.response("<caption> tl red square </caption>")
        loss = policy(build_pack([Tree(made, [response])], [(0, [0])])).sum()
        loss.backward()
    assert has_graph == [not frozen] * 2
    assert gathered.count("FORWARD") == 2
    assert ("PRE_BACKWARD" in gathered) != frozen
    grads = [p.grad is not None for p in visual.parameters()]
    assert any(grads) != frozen
    assert all(p.grad is not None for p in policy.hf.model.language_model.parameters())
    ranks.close()


# ----------------------------------------------------------------------------- validation

VALIDATION = {  # of each stage: rows that it is not trained on, and flags that make it short
    "sft": ("align", dict(steps=2, batch=8, lr=1e-2, eval_rollouts=True, max_response=32)),
    "align": ("rl", GAME | dict(probe_every=0, prompts_per_step=2)),
    "rlvr": ("align", ROLLOUTS | dict(steps=2, lr=1e-3, prompts_per_step=2)),
}


@pytest.mark.parametrize("name", STAGES)
def test_validation_is_evaluation_and_changes_nothing(world, tmp_path, name):
    """Before the first step and after each: as eval.py finds it. Weights, records and random
    numbers are those of the run without it."""
    stage, data, _, _ = STAGES[name]
    held_out, flags = VALIDATION[name]
    held_out = getattr(world, held_out)
    flags = COMMON | flags | dict(policy=world.sft, data=getattr(world, data))
    without = {key: flags[key] for key in flags if key != "eval_rollouts"}
    stage.main(stage.Args(**without, out=str(tmp_path / "without")))
    random_numbers = torch.get_rng_state(), random.getstate()
    flags |= dict(eval_data=held_out, eval_every=1, eval_rows=5, save_every=1, keep_every=1)
    out = tmp_path / "with"
    stage.main(stage.Args(**flags, out=str(out)))
    assert torch.equal(torch.get_rng_state(), random_numbers[0])
    assert random.getstate() == random_numbers[1]
    same(tensors(tmp_path / "without/last"), tensors(out / "last"))

    first, *found = records(out)
    assert first["step"] == 0 and not [key for key in first if key in ("loss", "grad_norm")]
    for plain, record in zip(records(tmp_path / "without"), found, strict=True):
        trained = {key: value for key, value in record.items() if not key.startswith("eval/")}
        nan = {key for key in plain if plain[key] != plain[key]}
        assert trained.keys() == plain.keys()
        assert [k for k in plain.keys() - nan - {"seconds"} if trained[k] != plain[k]] == []

    script = importlib.import_module("eval")
    flags = ["--policy", world.sft, f"{out}/step-000001", f"{out}/last", "--data", held_out]
    flags += ["--limit", "5", "--max_response", "32", "--device", "cpu"]
    flags += ["--seed", "7"]  # nothing to a greedy choice
    results = script.main(parse(script.Args, flags))
    for record, result in zip([first, *found], results, strict=True):
        assert record["eval/prompts"] == 5 and record["eval/seconds"] > 0
        for key in ("accuracy", "format", "length", "truncated", "items", "steps"):
            logged = record[f"eval/{key}"]
            logged = math.nan if logged is None else logged
            assert logged == pytest.approx(result[key], nan_ok=True), key
    assert len({record["eval/length"] for record in [first, *found]}) > 1  # it is being trained


def test_held_out_loss_is_the_loss_of_training(world, tmp_path, capsys):
    """On the rows of the first batch it is that batch's loss; and it is said that these rows are
    trained on."""
    flags = COMMON | dict(policy=world.sft, data=world.curated, eval_data=world.curated)
    flags |= dict(steps=1, batch=32, eval_every=0, eval_rows=0, schedule="constant", warmup=0.0)
    flags |= dict(lr=1e-3, keep_best="eval/loss")
    sft.main(sft.Args(**flags, out=str(tmp_path / "out")))
    first, last = records(tmp_path / "out")
    assert first["eval/loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert last["eval/loss"] < first["eval/loss"]
    printed = capsys.readouterr().out
    assert printed.count("warning: 32 of the 32 rows to validate on are trained on as well") == 1
    assert printed.count("| eval/loss ") == 2
    best = json.loads((tmp_path / "out/best/meta.json").read_text())
    assert best["best"] == {"metric": "eval/loss", "value": last["eval/loss"]}


def test_rows_that_are_trained_on_are_found_in_other_files(world, tmp_path, capsys):
    """By question and images, wherever and in whatever format they stand; a question alone, with
    another picture, is another row."""
    examples = read(world.rl, "rl")
    held_out = []
    for number in range(4):
        question = examples[number].messages[-1]["content"].replace("<image>", "").strip()
        picture = examples[4 if number == 3 else number].images[0]
        copy = tmp_path / f"{number}.png"
        copy.write_bytes(Path(picture).read_bytes())
        held_out.append({"question": f" {question}\n", "answer": "1", "image": copy.name})
    held_out[1]["question"] += " not in the training data"
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    args = rlvr.Args(policy="p", data=world.rl, out="o", eval_data=str(file))
    for searched, said in ((20_000, ""), (6, ", of which 1 row in 2 was looked at")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "SEARCHED", searched)
            evaluation.warn_of_overlap(read(file, "eval"), read(world.rl, "rl"), args)
        printed = capsys.readouterr().out
        assert "warning: 2 of the 4 rows to validate on" in printed
        assert f"first {file}:1 " in printed and f"{world.rl}{said})" in printed
    alone = replace(args, eval_rows=2)
    evaluation.warn_of_overlap(read(file, "eval"), read(world.curated, "sft"), alone)
    assert capsys.readouterr().out == ""
    evaluation.warn_of_overlap(read(world.rl, "eval"), examples, alone)
    assert "warning: 2 of the 2 rows to validate on" in capsys.readouterr().out


# ----------------------------------------------------------------------------- what stays


def test_checkpoints_that_stay_are_policies(world, tmp_path, capsys):
    """step-* and best/ open like any other, hold no optimiser, and eval.py draws their curve."""
    out = tmp_path / "out"
    flags = COMMON | ROLLOUTS | dict(policy=world.sft, data=world.rl, steps=3, lr=1e-3)
    flags |= dict(keep_every=2, eval_data=world.align, eval_rows=4, eval_every=1)
    rlvr.main(rlvr.Args(**flags, out=str(out), keep_best="eval/format"))
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"best", "last", "step-000002"}
    assert not list(out.glob("step-000002/resume")) and not list(out.glob("best/resume"))
    formats = [record["eval/format"] for record in records(out)]
    best = json.loads((out / "best/meta.json").read_text())
    assert best["best"] == {"metric": "eval/format", "value": max(formats)}
    assert best["step"] == formats.index(max(formats))
    opens_everywhere(out / "step-000002", world)
    opens_everywhere(out / "best", world)

    capsys.readouterr()
    script = importlib.import_module("eval")
    flags = ["--policy", str(out), "--all_steps", "--data", world.align, "--limit", "4"]
    flags += ["--max_response", "32", "--device", "cpu", "--out", f"{tmp_path}/eval.json"]
    results = script.main(parse(script.Args, flags))
    found = [(Path(result["policy"]).name, result["step"]) for result in results]
    assert found == [("step-000002", 2), ("last", 3)]
    curve = capsys.readouterr().out.split(f"accuracy of {out}, {world.align}, greedy\n")[1]
    for line, record in zip(curve.splitlines(), records(out)[2:], strict=True):
        step, accuracy, *bar = line.split()
        assert int(step) == record["step"]
        assert float(accuracy) == pytest.approx(record["eval/accuracy"], abs=1e-3)
        assert "".join(bar) == "█" * round(50 * record["eval/accuracy"])
