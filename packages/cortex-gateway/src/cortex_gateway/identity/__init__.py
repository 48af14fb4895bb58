"""Identity: keys, limits and budgets of those who ask.

`credentials` finds the key in a request's headers, `keyring` knows the keys, `limits` holds what a gateway counts by
itself (requests and tokens per minute, concurrency), `store` and its implementations what must outlive it (keys,
budgets). `windows` and `estimate` are pure. `identity` joins them; the relay talks to it alone. Credentials are never
sent on to a neuron (`relay.headers`), and no log line, metric or error holds more of a key than its id.
"""
