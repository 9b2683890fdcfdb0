"""The process that writes: one beside each rank, without torch, fed through shared memory.

``arena.py`` is the shared memory, ``client.py`` the rank's side, ``__main__.py`` the process, ``part.py`` writes a
rank's file, ``commit.py`` makes a step out of the files of all ranks.
"""
