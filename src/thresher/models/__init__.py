"""The DSA models: a Llama with its attention left open, the indexer, a small paged decoder, and loaders."""
