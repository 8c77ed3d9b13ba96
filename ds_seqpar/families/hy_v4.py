"""Hunyuan V4: the streams of the residual are mixed token by token."""

LIKE = "deepseek_v4"
