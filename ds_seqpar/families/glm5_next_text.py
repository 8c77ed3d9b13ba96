"""GLM-5-Next: the streams of the residual are mixed token by token."""

LIKE = "deepseek_v4"
