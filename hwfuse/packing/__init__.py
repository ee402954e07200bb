"""Weight layouts: checkpoint tensors to packed parameters, and back."""

from hwfuse.packing.fp8 import fn_to_fnuz, fnuz_to_fn, rows_per_scale
from hwfuse.packing.gdn import gdn_shards, pack_gdn, split_qkvzba, unpack_gdn
from hwfuse.packing.gemma4 import QKVNormMode, pack_gemma4, unpack_gemma4
from hwfuse.packing.int4 import deinterleave_scales, interleave_scales, pack_int4, unpack_int4
from hwfuse.packing.kda import kda_shards, kda_views, pack_kda, split_qkvbfg, unpack_kda
from hwfuse.packing.preshuffle import preshuffle_16x16, unpreshuffle_16x16
from hwfuse.packing.shards import Shard, ShardRows, shard_rows
from hwfuse.packing.w4a8 import repack_w4a8, unpack_w4a8

__all__ = [
    "QKVNormMode",
    "Shard",
    "ShardRows",
    "deinterleave_scales",
    "fn_to_fnuz",
    "fnuz_to_fn",
    "gdn_shards",
    "interleave_scales",
    "kda_shards",
    "kda_views",
    "pack_gdn",
    "pack_gemma4",
    "pack_int4",
    "pack_kda",
    "preshuffle_16x16",
    "repack_w4a8",
    "rows_per_scale",
    "shard_rows",
    "split_qkvbfg",
    "split_qkvzba",
    "unpack_gdn",
    "unpack_gemma4",
    "unpack_int4",
    "unpack_kda",
    "unpack_w4a8",
    "unpreshuffle_16x16",
]
