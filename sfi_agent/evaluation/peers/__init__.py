"""Side by side with other ways to decode: transformers alone, and the presses of kvpress."""
