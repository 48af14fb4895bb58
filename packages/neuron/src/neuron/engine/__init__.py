"""The engine of one loaded model: scheduler, paged KV cache, runner, sampler. Usable in-process, without sockets.

`engine.Engine` is the whole of it; `loading.load_engine` builds one from a `protocol.EngineConfig`.
"""
