"""What models write, split into text, reasoning and calls, in the formats of families."""
