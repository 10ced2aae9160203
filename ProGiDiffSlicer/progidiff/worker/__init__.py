"""The background process: it holds the model and answers the protocol on its standard streams."""
