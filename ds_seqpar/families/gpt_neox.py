"""GPT-NeoX: q, k, v are interleaved head by head in one weight."""

ROLES = {
    "layers.*.attention.query_key_value": ("qkv",),
    "layers.*.attention.dense": ("q",),
}
