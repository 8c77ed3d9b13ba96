"""The sharded layers: what a Hugging Face module becomes in place. Imports torch and comm only."""
