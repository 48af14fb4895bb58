"""The API surfaces: each parses request bodies into `conversation.Request` and projects `events.Event`s back.

- `openai_chat`: `/v1/chat/completions`
- `openai_completions`: `/v1/completions`
- `openai_responses`: `/v1/responses` and `/v1/responses/input_tokens`, stateless
- `anthropic_messages`: `/v1/messages` and `/v1/messages/count_tokens`
- `models`: `/v1/models`, one object that serves both dialects
- `errors`: error bodies, statuses and headers of both dialects
- `openai_chat_client`: the reverse of `openai_chat`, for talking to a server that speaks nothing else

No dialect knows another: what they share of a vendor's vocabulary is in `openai_fields`, `openai_custom_tools` and
`openai_answer`, what they share of JSON in `json_body`, and of hidden reasoning in `reasoning_signature`. `interface`
states what each surface offers. All of it is sans-I/O.
"""
