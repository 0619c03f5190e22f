"""What a choice of tokens costs and keeps: recall against another selection, needles found, pictures, run directories."""
