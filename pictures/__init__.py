"""Pictures: opened from strangers' files, laid out in sheets, drawn as plots."""
