"""
What no reader of the method needs: packs, sampler, log-probs, ranks, files. Nothing in here imports
a stage, a tool, or model.py, data.py, rewards.py.
"""
