"""Pictures with captions and labels: the shipped drawings, and photographs read where they are installed."""
