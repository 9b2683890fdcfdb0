"""Sharded checkpoints: save and load the state of a distributed training job. See docs/checkpoint_format.md."""
