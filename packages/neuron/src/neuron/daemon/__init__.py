"""The daemon of a host: HTTP, text, the life of models, engine processes under supervision. It never imports torch."""
