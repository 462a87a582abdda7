"""The decoding engine: token ids and tensors. It knows nothing of chat, tools or text."""
