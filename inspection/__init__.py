"""What lists, cards and nodes say of a concept and of other tools' files."""
