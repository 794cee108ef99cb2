"""DP-SGD on B: sampling, clipping, noise, accounting and the ledger."""
