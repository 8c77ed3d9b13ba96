"""Plan before you pay: what fits, what it costs. Predicts memory and step time of a sharded model from its config alone."""
