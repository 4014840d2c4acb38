"""The same defence as a user would write it for other servers, over the same library and images."""
