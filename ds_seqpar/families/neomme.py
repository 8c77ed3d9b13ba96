"""NeoMME: layers mix in the initial hidden states with two numbers of their own."""

LAYER_PARAMETERS = ("lambdas",)
TOKEN_INPUTS = ("initial_hidden_states",)
