"""A recorded run of sft.py beside the reference."""

from reference import method, steps
from reference.compare import Player, expected_rows, policy_weights, same_metrics
from reference.models import Policy
from reference.rows import Reader


def check_sft(trace, args):
    """All steps of a run of sft.py with the arguments `args` -> the policy's Player."""
    reader = Reader(args.policy, args.data, args)
    policy = Policy(args.policy, vision=not args.freeze_vision)
    weights = policy_weights(args.policy, args.freeze_vision)
    player = Player("policy", args.weight_decay, args.grad_clip, weights)
    order = reader.order(args.seed)
    most = args.max_prompt + args.max_response  # tokens of a conversation
    bad = set()

    def is_bad(row):
        return reader.is_bad(row) or len(reader.conversation(row).ids) > most

    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        rows, left_out = expected_rows(order, args.batch, is_bad)
        bad |= left_out
        (update,) = step["updates"]
        policy.take(update["before"])
        loss, tokens = steps.sft(policy, [reader.conversation(row) for row in rows])
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        gradient = policy.gradient()
        player.check(update, gradient, rate)
        same_metrics(
            step["metrics"],
            {
                "loss": loss,
                "tokens": tokens,
                "grad_norm": method.total_norm(gradient.values()),
                "lr": rate,
                "skipped": 0,
                "epoch": (number + 1) * args.batch / len(reader.rows),
                "left_out": len(bad),
            },
            {"lr": 1e-9},
        )
    return player
