"""Where tokens live: pages, index keys, attention caches, block means, layer state and placement over ranks."""

from thresher.cache.block_means import BlockMeans
from thresher.cache.index_keys import IndexKeyCache, load_keys, pack_keys
from thresher.cache.kv import KVCache
from thresher.cache.latents import LatentCache
from thresher.cache.pages import PageTable
from thresher.cache.placed import PlacedTable
from thresher.cache.placement import Placement
from thresher.cache.state import LayerState

__all__ = [
    "BlockMeans",
    "IndexKeyCache",
    "KVCache",
    "LatentCache",
    "LayerState",
    "PageTable",
    "PlacedTable",
    "Placement",
    "load_keys",
    "pack_keys",
]
