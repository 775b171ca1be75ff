"""Files of other tools: read into a Concept, and written from one. Content decides what a file is,
never its name, and nothing that is read can run code.
"""
