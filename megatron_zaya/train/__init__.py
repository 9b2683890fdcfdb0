"""Training: setup (composition root), step, loop, state, checkpointing of the whole, callbacks."""
