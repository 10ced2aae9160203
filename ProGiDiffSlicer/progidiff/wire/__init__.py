"""What the two sides say to each other: frames of bytes, and the messages in them. Standard library and numpy only."""
