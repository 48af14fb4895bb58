"""Translation for servers that speak only OpenAI chat: requests on their way there, answers on their way back."""
