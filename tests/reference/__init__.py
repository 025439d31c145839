"""
A second implementation of the method, to hold the first one to: one complete step of each stage,
written from METHOD.md, as slow and as plain as can be. One row at a time through plain
transformers, in float64, without packs; nothing is imported from the stages or from engine/.

    world     a tiny Qwen3-VL that writes the three parts more often than not, and rows with images
    rows      rows of files -> token ids and images, spans, verdicts
    models    log-probs of a policy, scores of a discriminator
    method    formulas: losses, advantages, learning rates, AdamW, the sampler's draw
    measures  what is logged
    steps     the step of each stage, of what was sampled and of the weights before it
    watch     a run of a real stage, recorded: rollouts, weights and gradients of each update, log
    compare   the two beside each other, in every stage; stage1 to stage3: each stage's own
"""
