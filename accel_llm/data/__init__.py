"""From files to batches: sources, formats, the ledger, encoding, packing, order, and the endless stream."""
