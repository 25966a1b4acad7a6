"""From files to batches: sources, row formats, the ledger, encoding, the cache, packing, order, and micro-batches."""
