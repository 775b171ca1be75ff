"""Where pictures of the class come from: drawn by the model, or out of a captioned collection."""
