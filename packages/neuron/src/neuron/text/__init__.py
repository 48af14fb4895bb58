"""Text of one model, on the daemon's side and without torch: prompts in, events out.

model = TextModel.load(path)
prompts = model.render(request)                                       # templates and tokenizer; raises ApiError
choices = model.resolve(request, prompts, max_model_len=32768)        # sampling, limits, grammar; raises ApiError
stream = model.event_stream(request, choices[0].prompt, choice=0)     # one per choice
stream.begin(prompt_logprobs); stream.feed(token_ids, logprobs); stream.finish("stop")
"""

from neuron.text.event_stream import EventStream
from neuron.text.model import Generation, TextModel
from neuron.text.render import Prompt
from neuron.text.tokenizer import Tokenizer, TokenizerError

__all__ = ["EventStream", "Generation", "Prompt", "TextModel", "Tokenizer", "TokenizerError"]
