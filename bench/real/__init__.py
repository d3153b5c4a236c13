"""A real pretrained model through everything: learn, convert, recover, serve, ask, time."""
