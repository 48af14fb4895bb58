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
    /,
) -> None:
    """x [rows, in] times a packed weight [out, in], plus a float32 bias [out] (address 0: none), into `out`.

    x, weight, bias, out: addresses; strides: elements from row to row. gated: silu(first half) * second half of the
    outputs, [rows, out / 2], whose halves must be whole panels. Raises `MemoryError`.
    """
