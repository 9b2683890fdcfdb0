"""The ZAYA model, one idea per file: cca, router, experts, moe, residual, layer, zaya_model, specs, init.

Shape suffixes used in every file: S sequence, B micro-batch, H hidden, Q query heads, K key-value heads, D head
width, C channels of the concatenated q and k, V value width, T tokens (S x B), E experts, F expert inner width,
R router width, N router classes (E + 1).
"""
