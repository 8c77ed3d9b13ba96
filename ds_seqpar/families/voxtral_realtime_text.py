"""Voxtral Realtime's decoder: in every layer a small network of the time scales all tokens alike, those of a rank on that rank."""

STYLES = {"layers.*.ada_rms_norm": "tokenwise"}
