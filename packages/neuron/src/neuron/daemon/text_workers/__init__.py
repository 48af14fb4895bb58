"""Text work in processes that may be killed.

What a client or a checkpoint says is parsed, rendered, tokenised and compiled into grammars here and not in the daemon:
a template is a program, a tokenizer's patterns may backtrack, and a request may be made to need both. One *host* per
model loads the tokenizer and the template, once, and does no more than fork *workers*; a worker does one job at a time,
within a budget of processor time and memory that the kernel enforces. When it runs over, the worker and its request are
gone, and the next worker is one fork away.

    daemon ── pool ──┬── host ── forks ──┬── worker      (one process tree per model)
                     └── frames ─────────┴── worker

`messages` is the border; `pool`, `turns` and `served_text` are on the daemon's side of it, `host`, `worker` and `jobs`
on the other.
"""
