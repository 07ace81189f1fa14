"""Floor 7: what a model is, for people to read: parameters as a tree, a description, pictures of
attention masks.
"""
