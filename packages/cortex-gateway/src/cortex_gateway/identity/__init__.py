"""Who is asking, and what they may: keys, limits and budgets.

Credentials are accepted in both styles and not checked yet: every request is anonymous. They are never sent on to
a neuron (`relay.headers`).
"""
