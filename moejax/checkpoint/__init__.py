"""Model folders: published and converted weights, host copies, checksums."""
