"""Regularization pictures out of a user's own large captioned collection, by what captions say."""
