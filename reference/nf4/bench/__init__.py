"""Speed and memory, measured side by side with the libraries people use today (`nf4 bench`)."""
