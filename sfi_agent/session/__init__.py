"""Sessions: chat, text and tools on top of the engine's token ids."""
