"""Storage backends: folders, web servers, buckets, commands, and the local cache."""
