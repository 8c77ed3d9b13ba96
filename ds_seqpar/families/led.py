"""LED: its encoder pads its tokens to whole windows; its attentions view their output in the shape of their input, and are repeated
whole."""

LIKE = "trocr"
STACKS = ("encoder", "decoder")
PADS = True
