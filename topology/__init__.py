"""The rails-only fabric: model, legality proofs, cost model, placement and emitters. Torch-free."""
