"""The border between the daemon and an engine group: the only module both sides import.

Frames are a 4-byte little-endian length followed by one msgpack document (a tagged union; structs as
arrays so that a step's frame is small). The daemon listens on a Unix socket; rank 0 of the group connects to it.
Only integers, short floats and strings cross: tensors never leave the device thread (law 2).

`epoch` counts the rebuilds of a group; a frame of another epoch is discarded, so a reply that was in flight when
a group died can never be taken for an answer of its successor.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 256 * 2**20

GRAMMAR_LIMITS: dict[str, int] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 32_768,
    "max_grammar_size": 500_000,
}
"""What llguidance may spend on one grammar: 20 ms to build its lexer, 15 ms on a step, 2 kB for each lexer state. Both
sides compile under the same bounds."""

# ---------------------------------------------------------------- daemon -> engine


class EngineConfig(msgspec.Struct, frozen=True, tag="config", array_like=True):
    """The first frame: everything a group needs to load one model; the daemon keeps it to rebuild the group.

    path: checkpoint folder (HF layout). devices: CUDA indexes, empty = CPU. dtype: for `auto` see
    `checkpoint.layout.dtype_of`. kv_cache_bytes: None sizes the cache from free memory (CUDA) or
    `kv_cache_tokens` (CPU). max_step_tokens is the token budget of one step; prefill chunks fill what decodes
    leave of it. tokenizer_json: the fast tokenizer's serialised form, for grammar masks. group_dir: with more than
    one rank, a private folder of this epoch where the ranks meet (rendezvous store and sockets between them).
    shares: relative sizes of the ranks' parts, in rank order; empty = equal parts. num_threads: torch threads on a CPU,
    of all ranks together. collective_timeout_s: how long the ranks wait to meet, and then for each other in one
    collective; the last resort behind the daemon's own deadlines. deterministic: results do not depend on the batch.
    overlap: launch a step while the one before is computed; None does so on devices and not on a CPU. cuda_graphs:
    record decode steps, where kernels allow it. debug: levers of tests, see `neuron.engine.loading.fault_injection`.
    all_reduce: how ranks sum, by what is fastest for each size of message, or always by NCCL (gloo on a CPU).
    weight_descriptors: inherited descriptors, by file name, of copies in memory that are read instead of the files.
    """

    model_id: str
    path: str
    tokenizer_json: str | None = None
    devices: tuple[int, ...] = ()
    tensor_parallel_size: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    page_size: int = 16
    max_step_tokens: int = 2048
    max_running: int = 256
    prefix_cache: bool = True
    num_threads: int | None = None
    epoch: int = 0
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    debug: dict[str, Any] = {}
    group_dir: str = ""
    shares: tuple[int, ...] = ()
    collective_timeout_s: float = 120.0
    weight_descriptors: dict[str, int] = {}
    all_reduce: Literal["auto", "library"] = "auto"
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """Resolved sampling of one sequence: every default has been applied.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and penalties 0/0/1 are "off". The noise of output
    position p is a pure function of (seed, p). logprobs: -1 none, k >= 0 the sampled token and the k best.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int = -1


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """A llguidance grammar (its serialised form, as `LLMatcher` takes it), compiled off the step thread.

    param: the field of the request that asks for it, as the client calls it.
    """

    grammar: str
    param: str = ""


class ContentDigest(msgspec.Struct, frozen=True, array_like=True):
    """What stands at `length` positions from `start` on, whose tokens are placeholders: a hash of it."""

    start: int
    length: int
    digest: bytes


class Generate(msgspec.Struct, frozen=True, tag="gen", array_like=True):
    """Start (or, with `output_ids`, resume) one sequence.

    Generation ends at a token of `stop_token_ids` (which is not reported as output), after `max_tokens` output
    tokens in all (resumed ones included), or when the grammar is complete. prompt_logprobs asks for the
    log-probability of every prompt token (completions with echo); it disables the prefix cache for the request.
    cache_salt: requests with different ones do not share cached prefixes. contents: of positions whose tokens do not
    say what stands there, in order. priority: above 0 comes before others of its time, below 0 behind them.
    """

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    grammar: GrammarSpec | None = None
    output_ids: tuple[int, ...] = ()
    prompt_logprobs: bool = False
    cache_salt: str = ""
    contents: tuple[ContentDigest, ...] = ()
    priority: int = 0


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Forget a sequence before the next step; no further frame mentions it. Unknown ids are ignored."""

    request_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    """Leave the step loop, free the device, exit 0."""


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """Answered at once by the thread that reads the socket, whatever the device does: only a stopped one is mute."""

    nonce: int


ToEngine = EngineConfig | Generate | Cancel | Shutdown | Ping

# ---------------------------------------------------------------- engine -> daemon


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """The first frame of every rank, each on a connection of its own."""

    version: int
    epoch: int
    rank: int
    pid: int


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    """Answer to the `Ping` of this nonce."""

    nonce: int


class EngineProgress(msgspec.Struct, frozen=True, tag="progress", array_like=True):
    """Of the rank whose connection it comes on."""

    phase: Literal["starting", "weights", "kv_cache", "warm_up"]
    bytes_done: int
    bytes_total: int


class CacheGroup(msgspec.Struct, frozen=True, array_like=True):
    """Layers whose state is kept in one way: pages of keys and values of one shape.

    layers: their numbers. num_kv_heads: of all ranks together in `Loaded`, of one rank elsewhere; head_dim: elements of
    a head. item_bytes: of an element. window: positions that a query sees, None for all.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * 2 * self.num_kv_heads * self.head_dim * self.item_bytes


class Loaded(msgspec.Struct, frozen=True, tag="loaded", array_like=True):
    """All ranks are ready; sent by rank 0. max_model_len: positions a sequence may have, capped by the KV cache.

    weight_bytes and kv_bytes_per_token are sums over ranks; num_pages the minimum, which all of them use.
    step_deadline_s: see EngineStats. read_bytes, read_seconds: what all ranks read of the checkpoint, and how long the
    slowest took until it was in place; 0 where nothing was read. read_from_memory: from copies in memory.
    cache_groups: what kv_bytes_per_token is made of. computed_by: device and library, as far as they decide the last
    bits of results.
    """

    epoch: int
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    kv_bytes_per_token: int
    weight_bytes: int
    load_seconds: float
    step_deadline_s: float = 60.0
    read_bytes: int = 0
    read_seconds: float = 0.0
    read_from_memory: bool = False
    cache_groups: tuple[CacheGroup, ...] = ()
    computed_by: str = ""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", array_like=True):
    """kind: `unsupported_architecture`, `bad_checkpoint`, `out_of_memory`, `unsupported_parallelism`, `device`,
    `internal`."""

    epoch: int
    kind: str
    message: str


FinishKind = Literal["stop", "length", "grammar"]


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one sampled token: its log-probability (natural, before temperature and truncation) and the best k."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class SequenceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence.

    token_ids: new output tokens (usually one; none while prefilling or when the stop token came). finish: set
    once, on the last update. cached_tokens: prompt tokens served from the prefix cache, on the first update.
    prompt_logprobs: on the first update when asked for (entry i belongs to prompt token i+1).
    """

    request_id: int
    token_ids: list[int] = []
    finish: FinishKind | None = None
    logprobs: list[Logprobs] | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[Logprobs] | None = None


class LogitsHealth(msgspec.Struct, frozen=True, array_like=True):
    """Of the vocabulary's logits at one position: counts, and figures of the finite ones (None if there are none)."""

    nan: int
    pos_inf: int
    neg_inf: int
    finite_min: float | None
    finite_max: float | None
    finite_mean: float | None


class SequenceFailed(msgspec.Struct, frozen=True, array_like=True):
    """One sequence ended with an error. kind: `invalid_grammar`, `too_long`, `nan_logits`, `step`, `internal`.

    health: with `nan_logits`, what the logits looked like.
    """

    request_id: int
    kind: str
    message: str
    health: LogitsHealth | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot after a step; the daemon keeps the last one, so /health never asks the engine.

    running and waiting count sequences; pages exclude page 0; cached_pages are free pages that still hold a
    reusable prefix (counted in free_pages). The *_tokens and *_seconds fields are cumulative since load.
    graph_steps: decode steps replayed as CUDA graphs; graphless_steps: those that found none recorded; late_compiles:
    kernels compiled after warming up. step_deadline_s: upper bound, with margin, of how long any next step may take by
    the engine's cost model; a group that holds work and sends no frame for so long is stuck.
    """

    step: int = 0
    running: int = 0
    waiting: int = 0
    free_pages: int = 0
    total_pages: int = 0
    cached_pages: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    step_deadline_s: float = 60.0
    graph_steps: int = 0
    graphless_steps: int = 0
    late_compiles: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """The one frame of a step; sent by rank 0.

    A group that holds sequences but can compute nothing (a grammar compiles) sends an empty one every second, so that
    silence with work in hand always means that it is stuck. A group that holds none sends none.
    """

    epoch: int
    stats: EngineStats
    updates: list[SequenceUpdate] = []
    failures: list[SequenceFailed] = []


class EngineFault(msgspec.Struct, frozen=True, tag="fault", array_like=True):
    """The group cannot go on (DeviceError, or a bug outside any one request) and exits after this frame."""

    epoch: int
    kind: str
    message: str


FromEngine = Hello | Pong | EngineProgress | Loaded | LoadFailed | StepOutput | EngineFault


class FrameError(Exception):
    """A frame that is too large or does not decode: the peer is broken or of another version."""


_to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
_from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One frame, length prefix included."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {len(payload)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return len(payload).to_bytes(4, "little") + payload


def decode_to_engine(payload: bytes | memoryview) -> ToEngine:
    """Raises `FrameError`."""
    try:
        message: ToEngine = _to_engine_decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise FrameError(str(exc)) from exc
    return message


def decode_from_engine(payload: bytes | memoryview) -> FromEngine:
    """Raises `FrameError`."""
    try:
        message: FromEngine = _from_engine_decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise FrameError(str(exc)) from exc
    return message


def frame_length(prefix: bytes | memoryview) -> int:
    """Length of the payload that follows a 4-byte prefix. Raises `FrameError` above `MAX_FRAME_BYTES`."""
    length = int.from_bytes(prefix, "little")
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return length
