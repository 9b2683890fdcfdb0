"""What bridges Megatron-Core versions and a missing accelerator. Nothing else in the project patches anything."""
