"""What a run says: one stream of events, and the sinks that show or store them."""
