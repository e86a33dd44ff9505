"""Reports: the data, the sentences, and what they are printed as."""
