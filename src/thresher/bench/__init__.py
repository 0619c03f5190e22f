"""Named cases, timing beside peers, and the records that performance figures come from."""
