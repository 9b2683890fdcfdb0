"""Which layouts are possible, and (one day) what they cost. Pure: no torch."""
