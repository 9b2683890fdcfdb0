"""Which layouts are possible, what they need and how long they take. Pure: no torch, but in `dryrun`."""
