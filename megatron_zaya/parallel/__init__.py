"""How a run is spread over ranks: process groups, and what crosses them."""
