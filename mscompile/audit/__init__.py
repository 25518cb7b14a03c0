"""The audit: is one network an abstraction of another? `pipeline` tells the story; nothing here rewrites a model."""
