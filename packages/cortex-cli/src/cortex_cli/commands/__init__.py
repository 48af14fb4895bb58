"""One module per command. Heavy imports happen inside the command, so that `cortex --version` stays quick."""
