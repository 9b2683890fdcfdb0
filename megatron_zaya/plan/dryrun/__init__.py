"""The dry run: the real model and the real training step of one rank, at the level of shapes, in a fake world.

run.py puts it together; observer.py watches every operation; live_bytes.py, collectives.py and operations.py say
what an operation means for memory, for the network and for the arithmetic units; shapes.py lets operations run whose
result depends on values that are not there. The only part of `plan` that imports torch.
"""
