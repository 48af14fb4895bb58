"""Text of one model, without torch: requests become prompts, output ids become events.

In a text worker, which may be killed (`neuron.daemon.text_workers`), since the checkpoint's own programs run there:

model = TextModel.load(path)                                          # neuron.daemon.prompt.model
prompts = model.render(request)                                       # templates and tokenizer; raises ApiError
choices = model.resolve(request, prompts, max_model_len=32768)        # sampling, limits, grammar; raises ApiError

In the daemon, from plain data alone (`token_table`, `prompt`, `event_stream`):

stream = text.event_stream(request, choices[0].prompt, choice=0)      # one per choice
stream.begin(prompt_logprobs); stream.feed(token_ids, logprobs); stream.finish("stop")
"""
