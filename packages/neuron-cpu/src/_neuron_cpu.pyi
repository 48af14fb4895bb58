def instructions() -> str:
    """The instruction set that is used: `avx512`, `avx2` or `base`."""

def num_threads() -> int:
    """Threads that compute together, the caller's included."""

def set_num_threads(number: int, /) -> None:
    """Change how many threads compute together. No other call may run."""

def pack(element_type: int, rows: int, panels: int, num_panels: int, in_features: int, /) -> None:
    """Rearrange `num_panels` times 32 rows [32, in] at the address `rows` into panels [in, 32] at `panels`.

    They may be the same address. Raises `MemoryError`.
    """

def linear(
    x_type: int,
    weight_type: int,
    out_type: int,
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    out_features: int,
    x_stride: int,
    out_stride: int,
    gated: bool,
    blocks: int,
    /,
) -> None:
    """x [rows, in] times a packed weight [out, in], plus a float32 bias [out] (address 0: none), into `out`.

    x, weight, bias, out: addresses; strides: elements from row to row. gated: silu(first half) * second half of the
    outputs, [rows, out / 2], whose halves must be whole panels. blocks: the format of a weight of `BLOCKS`. Raises
    `MemoryError`, and `ValueError` for a format that does not exist.
    """

def pack_blocks(blocks: int, raw: int, panels: int, rows: int, row_bytes: int, first: int, positions: int, /) -> None:
    """Rows of ggml's blocks at `raw`, each of `row_bytes`, into panels of a format.

    first, positions: what of each row, multiples of a unit. Rows up to the last panel's end are zeros. Raises
    `ValueError` for a format that does not exist.
    """

def unit_bytes(blocks: int, /) -> int:
    """Bytes of a unit of a format: of 32 outputs and its positions. Raises `ValueError` for one that does not exist."""

def gather_rows(blocks: int, weight: int, wanted: int, out: int, rows: int, in_features: int, /) -> None:
    """Rows of a weight in blocks as float32 [rows, in], by their numbers, int64 [rows]."""

def rms_norm(x: int, residual: int, weight: int, out: int, rows: int, width: int, eps: float, /) -> None:
    """RMSNorm of float32 rows, of the sum of x and residual (address 0: of x); the sum then takes residual's place."""

def rotate_and_write(
    qkv: int,
    positions: int,
    angles: int,
    q_weight: int,
    k_weight: int,
    cache: int,
    slots: int,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    page_size: int,
    eps: float,
    /,
) -> None:
    """Queries and keys of packed float32 rows, normalised (address 0: not) and rotated in place; keys and values into
    their pages.

    positions, slots: [rows] int64; angles: [positions, rotary_dim], cosines and then sines; cache: [pages, 2,
    page_size, kv_heads, head_dim].
    """

def attention(
    q: int,
    cache: int,
    out: int,
    tables: int,
    query_start: int,
    context_lens: int,
    q_stride: int,
    table_stride: int,
    sequences: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int,
    scale: float,
    /,
) -> None:
    """Causal attention of the last rows of sequences to their pages, all float32; indexes are int32.

    tables: [sequences, table_stride]; query_start: [sequences + 1]; context_lens: [sequences], own rows included;
    window: keys that a row sees, 0 for all. Raises `MemoryError`.
    """
