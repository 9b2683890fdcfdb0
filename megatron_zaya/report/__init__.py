"""A run, looked at: its folder (`records`, `run`), pictures and pages of it (`charts`, `page`), live (`top`)."""
