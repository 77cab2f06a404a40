"""Windows: cutting files, filtering windows, and the tables of their scores."""
