"""The command line: demo, chat, plugins, and the generator of the reference pages."""
