"""Data: text to Megatron's .bin/.idx, datasets over mcore's GPTDataset, a resumable order of samples.

The path of a token: `sources` (files, JSON lines) -> `tokenizer` -> `prepare` (worker processes) -> `output`
(the atomic .bin/.idx pair and its sidecar) -> `index_file` (reads them back without torch) -> `datasets`
(train and validation samples, with `index_cache` building their indices once) -> `sampler` (who reads what,
and when). Everything but `sampler` is torch-free at import, so that a command line can
check its input at once.
"""
